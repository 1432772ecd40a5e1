"""A run's numbers, and its line over the paper's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from layerskip_vllm.tools.bench.bench_report import BenchReport
from layerskip_vllm.tools.bench.command import BenchCommand
from layerskip_vllm.tools.bench.engine_run import EngineFacts, TaskRound, find_facts
from layerskip_vllm.tools.bench.samples import TaskSample
from layerskip_vllm.tools.bench.tasks import TASKS
from layerskip_vllm.tools.bench.turns import TaskRun
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters

SETTING = {"num_samples": 2, "num_shots": 0, "max_tokens": 8, "batch_size": 1}


def make_run(
    exit_layer: int | None, seconds: Sequence[float], tokens: Sequence[tuple[int, ...]], rates: str
) -> TaskRun:
    """Make a run of one request a round; `rates` is such as "1/4 3/4": accepted of drafted."""
    rounds = [
        TaskRound(
            seconds=took,
            texts=("text",),
            token_ids=(ids,),
            counters=SpecDecodeCounters(
                num_draft_tokens=int(rate.partition("/")[2]),
                num_accepted_tokens=int(rate.partition("/")[0]),
            ),
        )
        for took, ids, rate in zip(seconds, tokens, rates.split(), strict=True)
    ]
    length = 4 if exit_layer else 0
    facts = EngineFacts("V1", "cpu", "float32", 128, exit_layer, length, str(length))
    return TaskRun(facts, tuple(rounds))


def list_cells(report: BenchReport) -> list[list[str]]:
    """Print a report's table and read its lines."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.build_table())
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capture.get().splitlines()
        if line.startswith("│")
    ]


@pytest.fixture
def report() -> BenchReport:
    runs = {
        "plain": make_run(None, [2.0, 4.0], [(1, 2, 3, 4), (5, 6)], "0/0 0/0"),
        "layerskip": make_run(8, [1.0, 1.0], [(1, 2, 3, 4), (5, 7)], "1/4 3/4"),
    }
    samples = [TaskSample(str(n), "", {}) for n in range(2)]
    scores = {"plain": {"ROUGE-2": [0.5, 0.1]}, "layerskip": {"ROUGE-2": [0.5, 0.2]}}
    return BenchReport("xsum", "models/mine", SETTING, 3, samples, runs, scores)


def test_means_are_over_rounds_as_in_the_paper(report: BenchReport) -> None:
    plain, drafted = report.runs["plain"], report.runs["layerskip"]
    assert plain.tokens_per_s == pytest.approx((4 / 2 + 2 / 4) / 2)
    assert plain.seconds_per_token == pytest.approx((2 / 4 + 4 / 2) / 2)
    assert report.speedup == pytest.approx(1.25 / 0.375)
    assert drafted.acceptance == pytest.approx(0.5)
    assert plain.acceptance is None
    assert (report.num_same_tokens, report.num_same_scores) == (1, 1)


def test_table_has_this_run_over_the_papers_lines(report: BenchReport) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.build_table())
    assert list_cells(report) == [
        ["mine", "8", "4", "0.300 → 0.350", "1.2 → 3.0", "3.33", "50.0%"],
        ["paper, Table 3: Llama2 7B, H100", "8", "12", "0.073 → 0.073", "63.4 → 104.7", "1.54",
         "54.6%"],
        ["paper, Table 3: Llama2 13B, H100", "15", "4", "0.124 → 0.124", "43.8 → 60.5", "1.34",
         "67.7%"],
    ]  # fmt: skip
    assert "1 more did not fit into the context" in capture.get()


@pytest.mark.parametrize(
    ("length", "words"), [("auto", "auto, up to 8"), ("auto:3", "auto, up to 3"), (3, "3")]
)
def test_report_says_so_when_the_engine_chooses_how_much_it_drafts(
    configure: Callable[..., Any], report: BenchReport, length: str | int, words: str
) -> None:
    settings = {"method": "layerskip", "exit_layer": 2, "num_speculative_tokens": length}
    facts = find_facts(configure(speculative_config=settings))
    runs = {**report.runs, "layerskip": replace(report.runs["layerskip"], facts=facts)}
    report = replace(report, runs=runs)
    assert list_cells(report)[0][1:3] == ["2", words]
    assert report.to_json()["runs"]["layerskip"]["length"] == words
    assert report.to_json()["runs"]["plain"]["length"] == "0"


def test_plain_vllm_has_neither_e_nor_k(configure: Callable[..., Any]) -> None:
    facts = find_facts(configure())
    assert (facts.exit_layer, facts.num_speculative_tokens, facts.length) == (None, 0, "0")


def test_json_has_every_completion_with_its_scores(report: BenchReport) -> None:
    content = json.loads(json.dumps(report.to_json()))
    assert content["speedup"] == pytest.approx(3.333, abs=1e-3)
    assert content["num_left_out"] == 1
    assert content["samples"][1]["layerskip"] == {
        "completion": "text",
        "num_tokens": 2,
        "scores": {"ROUGE-2": 0.2},
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"model": "facebook/layerskip-llama2-7B"},
            {"exit_layer": 8, "num_speculative_tokens": 12},
        ),
        ({"model": "/m/layerskip-llama2-13B/"}, {"exit_layer": 15, "num_speculative_tokens": 12}),
        (
            {"model": "facebook/layerskip-llama2-7B", "num_speculative_tokens": "3"},
            {"exit_layer": 8, "num_speculative_tokens": 3},
        ),
        (
            {"model": "facebook/layerskip-llama2-7B", "num_speculative_tokens": "auto:6"},
            {"exit_layer": 8, "num_speculative_tokens": "auto:6"},
        ),
        (
            {"model": "facebook/layerskip-llama2-7B", "speculative": {"exit_adapter": "mine"}},
            {"exit_adapter": "mine"},
        ),
        ({"model": "facebook/layerskip-llama3-8B"}, {}),
        ({"model": "mine", "exit_layer": 2}, {"exit_layer": 2}),
    ],
)
def test_e_and_k_are_the_papers_for_its_checkpoints(
    options: dict[str, object], expected: dict[str, object]
) -> None:
    engines = BenchCommand(task="cnn_dm", **options)._make_engines()
    assert engines["layerskip"]["speculative_config"] == {"method": "layerskip", **expected}
    assert "speculative_config" not in engines["plain"]
    assert [engine["enable_prefix_caching"] for engine in engines.values()] == [False, False]


def test_every_line_of_the_paper_is_as_fast_as_it_says() -> None:
    """Ratios of tokens a second and of times per token differ, but not by much."""
    for task in TASKS.values():
        for line in task.paper:
            plain, drafted = line.tokens_per_s
            assert drafted / plain == pytest.approx(line.speedup, rel=0.12)
