"""Two ranks give the tokens and the acceptance of one, and draft the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.checks import DRAFTERS
from tests.support.engine_process import EngineProcess
from tests.support.scenarios import Request, Scenario, layerskip, tokens
from tests.support.worker_probe import Served

pytestmark = pytest.mark.engine

EXIT_LAYER, K = 4, 3
GREEDY = tuple(Request(tokens(length)) for length in (3, 17, 40, 32, 55, 9))
SEEDED = tuple(
    Request(tokens(length), {"temperature": 1.0, "max_tokens": 10, "seed": length})
    for length in (5, 20, 34)
)
UNSEEDED = tuple(replace(request, params={**request.params, "seed": None}) for request in SEEDED)


@dataclass(frozen=True)
class Case:
    """A model and settings to compare one rank and two on."""

    architecture: str
    speculative: dict[str, Any]
    engine: dict[str, Any]
    requests: tuple[Request, ...] = GREEDY


CASES = {
    # Batches of greedy requests, batches with some of them, and batches with none.
    "probabilistic": Case(
        "llama", {"draft_sample_method": "probabilistic"}, {}, GREEDY + SEEDED + UNSEEDED
    ),
    "local_argmax": Case("llama", {"use_local_argmax_reduction": True}, {}),
    "experts": Case("mixtral", {}, {"enable_expert_parallel": True}),
}


@dataclass(frozen=True)
class Comparison:
    """What plain vLLM, one rank and two ranks gave."""

    runner: str
    case: Case
    plain: Served
    one: Served
    two: Served


@pytest.fixture(scope="module", params=["v1", "v2"])
def process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    variables = {
        # Else vLLM wants a NUMA node for each rank.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Else each rank compiles small functions of vLLM's for ten seconds and more.
        "TORCHDYNAMO_DISABLE": "1",
    }
    process = EngineProcess(request.param, tmp_path_factory.mktemp("ranks"), variables)
    yield process
    process.stop()


@pytest.fixture(scope="module", params=CASES)
def comparison(
    request: pytest.FixtureRequest, process: EngineProcess, checkpoint: Callable[..., Path]
) -> Comparison:
    case = CASES[request.param]
    speculative = layerskip(EXIT_LAYER, K, **case.speculative)
    scenario = Scenario(
        str(checkpoint(case.architecture)), case.requests, speculative, {"max_num_seqs": 3}
    )
    two_ranks = {"tensor_parallel_size": 2, **case.engine}
    plain, one, two = (
        process.run("tests.support.distributed_job:serve", scenario)
        for scenario in (
            scenario.plain(),
            scenario,
            replace(scenario, engine={**scenario.engine, **two_ranks}),
        )
    )
    return Comparison(process.runner, case, plain, one, two)


@pytest.mark.feature("Engine", "tensor parallelism: {comparison}")
def test_tokens_equal_those_of_one_rank_when_there_are_two(comparison: Comparison) -> None:
    assert comparison.two.token_ids == comparison.one.token_ids
    num_greedy = len(GREEDY)
    assert comparison.two.token_ids[:num_greedy] == comparison.plain.token_ids[:num_greedy]


def test_acceptance_equals_that_of_one_rank_when_there_are_two(comparison: Comparison) -> None:
    assert comparison.two.counts == comparison.one.counts
    num_drafts, num_draft_tokens, num_accepted, _ = comparison.two.counts
    assert num_draft_tokens == num_drafts * K
    assert 0.05 < num_accepted / num_draft_tokens < 0.95


def test_all_ranks_draft_the_same_when_there_are_two(comparison: Comparison) -> None:
    first, second = comparison.two.drafts
    assert len(first) > 10
    assert first == second
    assert first == comparison.one.drafts[0]


def test_each_rank_drafts_as_the_user_says_when_there_are_two(comparison: Comparison) -> None:
    assert [worker["rank"] for worker in comparison.two.workers] == [0, 1]
    assert len({worker["pid"] for worker in comparison.two.workers}) == 2
    for worker in comparison.two.workers:
        assert worker["drafter"] == DRAFTERS[comparison.runner]
        assert (worker["exit_layer"], worker["num_speculative_tokens"]) == (EXIT_LAYER, K)
        assert worker["num_attn_layers"] == EXIT_LAYER
        assert worker["is_expert_parallel"] == ("enable_expert_parallel" in comparison.case.engine)
