"""Two ranks give the tokens and the acceptance of one, and draft the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.checks import DRAFTERS
from tests.support.draft_vocabs import make_draft_vocab
from tests.support.engine_process import RunnerProcess
from tests.support.exit_adapters import make_exit_adapter
from tests.support.lora_adapters import make_lora_adapter
from tests.support.scenarios import Request, Scenario, layerskip, tokens
from tests.support.worker_probe import Served

EXIT_LAYER, K = 4, 3
GREEDY = tuple(Request(tokens(length)) for length in (3, 17, 40, 32, 55, 9))
SEEDED = tuple(
    Request(tokens(length), {"temperature": 1.0, "max_tokens": 10, "seed": length})
    for length in (5, 20, 34)
)
UNSEEDED = tuple(replace(request, params={**request.params, "seed": None}) for request in SEEDED)


@dataclass(frozen=True)
class Case:
    """A model and settings to compare one rank and two on; `parallel` is for the two alone."""

    architecture: str
    speculative: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    requests: tuple[Request, ...] = GREEDY


CASES = {
    # Batches of greedy requests, batches with some of them, and batches with none.
    "probabilistic": Case(
        "llama",
        {"draft_sample_method": "probabilistic"},
        requests=GREEDY + SEEDED + UNSEEDED,
    ),
    "local_argmax": Case("llama", {"use_local_argmax_reduction": True}),
    "experts": Case("mixtral", parallel={"enable_expert_parallel": True}),
    "LoRA": Case("llama", engine={"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}),
    "exit adapter": Case("llama"),
    # Both ranks have some of its 99 tokens, of other numbers.
    "draft vocabulary": Case("llama-tied", {"draft_sample_method": "probabilistic"}),
    "reused exit states": Case("llama", {"reuse_exit_states": "on"}),
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
) -> Iterator[RunnerProcess]:
    variables = {
        # Else vLLM wants a NUMA node for each rank.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Else each rank compiles small functions of vLLM's for ten seconds and more.
        "TORCHDYNAMO_DISABLE": "1",
    }
    process = RunnerProcess(request.param, tmp_path_factory.mktemp("ranks"), variables)
    yield process
    process.stop()


@pytest.fixture(scope="module", params=CASES)
def comparison(
    request: pytest.FixtureRequest,
    process: RunnerProcess,
    checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Comparison:
    case = CASES[request.param]
    folder, model = tmp_path_factory.mktemp("adapters"), checkpoint(case.architecture)
    if request.param == "LoRA":
        adapters = [str(make_lora_adapter(folder / str(seed), model, seed)) for seed in range(2)]
        by_turns = zip(GREEDY, itertools.cycle([*adapters, None]), strict=False)
        case = replace(case, requests=tuple(replace(r, adapter=folder) for r, folder in by_turns))
    elif request.param == "exit adapter":
        sizes = {"exit_layer": EXIT_LAYER, "num_speculative_tokens": K}
        adapter = make_exit_adapter(folder / "exit", std=0.1, **sizes)
        case = replace(case, speculative={"exit_adapter": str(adapter)})
    elif request.param == "draft vocabulary":
        file = make_draft_vocab(folder / "ids.json", range(60, 159))
        case = replace(case, speculative={**case.speculative, "draft_vocab": file})
    speculative = layerskip(EXIT_LAYER, K, **case.speculative)
    scenario = Scenario(str(model), case.requests, speculative, {"max_num_seqs": 3, **case.engine})
    two_ranks = {"tensor_parallel_size": 2, **case.parallel}
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
        is_split = "enable_expert_parallel" in comparison.case.parallel
        assert worker["runs_part_of_the_experts"] == is_split
        is_reused = "reuse_exit_states" in comparison.case.speculative
        assert (worker["num_reused"] > 4) == is_reused
        is_local = "use_local_argmax_reduction" in comparison.case.speculative
        assert (worker["num_local_argmax"] > 0) == is_local
