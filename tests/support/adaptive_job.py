"""Runs in a child of `engine_process`: V2's adaptive verification, without its GPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.spec_decode import adaptive_verification

from tests.support.child_engines import engine
from tests.support.jobs import Server
from tests.support.scenarios import Report, Scenario

# Milliseconds by requests and by tokens. From 8 tokens on so dear that hardly a draft pays, however
# sure: steps of several requests are cut down to those that promise most.
DRAFT_COSTS, VERIFY_COSTS = [(1, 0.1), (8, 0.1)], [(1, 1.0), (8, 1.0), (64, 64.0)]


def serve_adaptively(scenario: Scenario) -> tuple[Report, list[tuple[int, int]], float]:
    """Serve a scenario on V2, with steps cut down to the drafts that pay.

    What vLLM asks of a GPU is taken as given: full CUDA graphs, whose costs are made up here, and
    attention that learns on the device how long queries are, as the CPU's does.

    Returns:
        The report; of each step with drafts how many were scheduled and how many verified; and the
        largest difference between what was said of a draft by its request and by its row.
    """
    supports_all = {
        "get_query_lens_mismatch_unsupported_backend": lambda *_, **__: None,
        "get_varlen_cudagraph_unsupported_backend": lambda *_, **__: None,
        "_assign_draft_token_budget_compiled": adaptive_verification._assign_draft_token_budget,
    }
    with (
        mock.patch.object(VllmConfig, "_validate_adaptive_verification"),
        mock.patch.object(model_runner, "resolve_adaptive_cudagraph_mode", lambda mode, **_: mode),
        mock.patch.multiple(adaptive_verification, **supports_all),
        engine(scenario) as llm,
    ):
        server = Server(llm, scenario)
        runner = server.core.model_executor.driver_worker.worker.model_runner
        manager, speculator = runner.adaptive_verification, runner.speculator
        manager.set_cost_curves(DRAFT_COSTS, VERIFY_COSTS)
        budgets: list[tuple[int, int]] = []
        differences: list[torch.Tensor] = []
        get_num_tokens, propose = manager.get_num_tokens, speculator.propose

        def get_and_see(*args: Any) -> int:
            num_tokens: int = get_num_tokens(*args)
            num_drafts, _, budget = manager._batch_budget
            budgets.append((sum(num_drafts.values()), budget))
            return num_tokens

        def propose_and_see(*args: Any, **kwargs: Any) -> Any:
            drafts = propose(*args, **kwargs)
            rows = (speculator.idx_mapping >= 0).nonzero().flatten()
            steps = slice(kwargs["num_speculative_tokens"])
            by_row = speculator.draft_token_confidence_probs[rows, steps]
            by_request = speculator.acceptance_estimator.predictions[speculator.idx_mapping[rows]]
            differences.append((by_row - by_request[:, steps]).abs())
            return drafts

        manager.get_num_tokens, speculator.propose = get_and_see, propose_and_see
        report = server.run()
    return report, budgets, max(d.max().item() for d in differences if d.numel())
