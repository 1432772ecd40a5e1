"""`vllm serve --data-parallel-size 2`: a dense model, and experts spread over the ranks.

The ranks of a dense model know nothing of one another. Those of a mixture of experts exchange
tokens in every layer of every step, draft steps too: one that has no request must run along.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.serving.server import ModelServer
from tests.support.engine_process import REPOSITORY, RUNNERS
from tests.support.engines import Engines
from tests.support.scenarios import Request, Scenario, tokens

MODELS = {"a dense model": "llama", "experts": "mixtral"}
EXIT_LAYER, K = 4, 3
NUM_TOKENS = 20
PROMPTS = tuple(tokens(length) for length in (17, 40, 9, 32))


@dataclass(frozen=True)
class Service:
    """A server with two data-parallel ranks, and what plain vLLM answers to `PROMPTS`."""

    server: ModelServer
    has_experts: bool
    expected: list[list[int]]

    def complete(self, index: int, rank: int | None = None) -> list[int]:
        """The tokens that follow a prompt."""
        response = self.server.complete(
            PROMPTS[index], rank, max_tokens=NUM_TOKENS, ignore_eos=True, return_token_ids=True
        )
        return response["choices"][0]["token_ids"]


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=RUNNERS)
def service(
    request: pytest.FixtureRequest,
    kind: str,
    engines: Engines,
    checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    runner, model, has_experts = request.param, checkpoint(MODELS[kind]), kind == "experts"
    requests = tuple(Request(prompt, {"max_tokens": NUM_TOKENS}) for prompt in PROMPTS)
    (plain,) = engines.serve(runner, Scenario(str(model), requests))
    expected = [list(token_ids) for (token_ids,) in plain.token_ids]
    paths = [RUNNERS[runner].get("PYTHONPATH"), str(REPOSITORY), os.environ.get("PYTHONPATH")]
    variables = {
        **RUNNERS[runner],
        "VLLM_SERVER_DEV_MODE": "1",  # for `ModelServer.call_workers`
        # vLLM 0.33 has each rank look for a NUMA node of its own number, unless this is set.
        "VLLM_CPU_SIM_MULTI_NUMA": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with ModelServer(
        tmp_path_factory.mktemp("server"),
        str(model),
        "--data-parallel-size=2",
        "--api-server-count=1",
        *(["--enable-expert-parallel"] if has_experts else []),
        "--speculative-model=layerskip",
        f"--spec-exit-layer={EXIT_LAYER}",
        f"--num-speculative-tokens={K}",
        "--worker-extension-cls=tests.support.worker_probe.WorkerProbe",
        variables=variables,
    ) as server:
        if has_experts:
            server.call_workers("probe_add_expert_parallelism")
        server.call_workers("probe_count_dummy_drafts")
        yield Service(server, has_experts, expected)


def test_each_rank_says_what_drafts_when_the_metrics_are_read(service: Service) -> None:
    lines = service.server.fetch("/metrics").splitlines()
    found = [line for line in lines if line.startswith("vllm:layerskip_info{")]
    assert len(found) == 2
    for rank, line in enumerate(found):
        assert f'engine="{rank}"' in line
        assert f'exit_layer="{EXIT_LAYER}"' in line


@pytest.mark.parametrize("rank", [0, 1])
def test_tokens_equal_plain_when_the_other_rank_is_idle(service: Service, rank: int) -> None:
    before = service.server.counters(rank)
    assert service.complete(0, rank) == service.expected[0]
    counted = service.server.counters(rank) - before
    assert 0 < counted.num_accepted_tokens < counted.num_draft_tokens


def test_idle_rank_drafts_along_when_experts_are_spread(service: Service) -> None:
    (before,) = service.server.call_workers("probe_dummy_drafts")
    service.complete(0, rank=1)
    (after,) = service.server.call_workers("probe_dummy_drafts")
    has_run_along = after["num_dummy_drafts"] > before["num_dummy_drafts"]
    assert has_run_along == service.has_experts


@pytest.mark.feature("Engine", "data parallelism: {kind}")
def test_tokens_equal_plain_when_both_ranks_serve(service: Service) -> None:
    """The ranks start and stop at different steps, since their drafts are accepted differently."""
    before = [service.server.counters(rank).num_drafts for rank in (0, 1)]
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        answers = clients.map(service.complete, range(len(PROMPTS)), (0, 1, 0, 1))
        assert list(answers) == service.expected
    after = [service.server.counters(rank).num_drafts for rank in (0, 1)]
    assert all(now > then for now, then in zip(after, before, strict=True))
