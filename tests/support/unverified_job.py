"""Runs in a child of `engine_process`: Model Runner V1 with a verification that refuses nothing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from tests.support.jobs import serve
from tests.support.scenarios import Report, Scenario


def serve_unverified(scenario: Scenario) -> Report:
    """Serve a scenario with a new engine that accepts every draft."""
    with mock.patch("vllm.v1.sample.rejection_sampler.rejection_sample", _accept_all):
        return serve(scenario)


def _accept_all(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """The arguments of vLLM's function and its result: `[num_reqs, max_spec_len + 1] int32`."""
    output = draft_token_ids.new_full((len(num_draft_tokens), max_spec_len + 1), -1)
    drafts = draft_token_ids.split(num_draft_tokens)
    for row, draft, bonus in zip(output, drafts, bonus_token_ids, strict=True):
        row[: len(draft)] = draft
        row[len(draft)] = bonus
    return output.int()
