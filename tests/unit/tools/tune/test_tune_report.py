"""What `layerskip-vllm tune` prints, writes and draws of a run, here a made-up one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerskip_vllm.tools.bench.engine_run import EngineFacts
from layerskip_vllm.tools.output import write_json
from layerskip_vllm.tools.tune.designs import Design, Speedups
from layerskip_vllm.tools.tune.drafts import DraftRecord
from layerskip_vllm.tools.tune.picture import draw_tuning, make_tuning_figure
from layerskip_vllm.tools.tune.step_costs import StepCosts
from layerskip_vllm.tools.tune.trials import Trial, TrialOutcome
from layerskip_vllm.tools.tune.tune_report import TuneReport
from layerskip_vllm.tools.tune.tuning import Tuning

SIZES = (1, 4)
NUM_LAYERS = 8


def make_report(scale: float = 1.0, auto: dict[int, float] | None = None) -> TuneReport:
    """A run over eight layers in which E = 2, K = 4 with lookup was fastest."""

    def predict(design: Design) -> Speedups:
        by_load = {
            (b, k): scale * (1 + k * (9 - k) / (20 * b * design.exit_layer)) + 0.1 * design.looks_up
            for b in SIZES
            for k in range(9)
        }
        return Speedups(design, by_load)

    designs = [Design(e, looks_up=looks_up) for e in range(1, 8) for looks_up in (False, True)]
    predictions = [predict(design) for design in designs]
    trials = [
        Trial(predict(design), Speedups(design, {(b, 4): scale * speed for b in SIZES}))
        for design, speed in ((Design(2), 1.4), (Design(2, looks_up=True), 1.5))
    ]
    outcome = TrialOutcome(trials, auto)
    costs = StepCosts(NUM_LAYERS, 1.5, {1: 4e-3, 4: 6e-3}, {(1, 0): 4e-3, (4, 0): 6e-3}, {1: 4e-4})
    runs = [[[[3, 2, 1, 0, 2, 1, 0, 0, 3, 2, 1]]] * (NUM_LAYERS - 1)]
    record = DraftRecord(NUM_LAYERS, 1.5, runs, [[-1] * 11])
    facts = EngineFacts("V1", "", "float32", 512, None, 0, "0")
    tuning = Tuning(facts, costs, predictions, outcome, {"method": "layerskip", "exit_layer": 2})
    texts, engine_args = ["text.txt", "b.txt"], {"model": "folder/tiny"}
    return TuneReport("folder/tiny", texts, engine_args, record, tuning, 120.0)


def test_report_says_what_was_fastest() -> None:
    report = make_report()
    assert report.entry == {"exit_layer": 2, "num_speculative_tokens": 4}
    assert report.describe() == (
        "E = 2, lookup, K = 4: 1.50, 1.50 times plain vLLM's tokens a second with 1, 4 requests at "
        "once"
    )
    assert report.describe_run().startswith("tiny (float32), greedy completions of text.txt and 1")


def test_report_says_that_the_engine_chooses_when_k_is_auto() -> None:
    assert make_report(auto={1: 1.6, 4: 1.5}).describe().startswith("E = 2, lookup, K auto: 1.60,")


def test_report_has_no_settings_when_nothing_pays() -> None:
    report = make_report(scale=0.6)
    assert report.describe().startswith("Nothing pays; at best E = 2, lookup, K = 4: 0.90, 0.90")
    assert report.to_json()["speculative_config"] is None


def test_json_holds_what_was_weighed_and_tried(tmp_path: Path) -> None:
    write_json(tmp_path / "tune.json", make_report().to_json())
    written = json.loads((tmp_path / "tune.json").read_text())
    assert written["speculative_config"] == {"method": "layerskip", "exit_layer": 2}
    assert written["speedup_by_batch_size"] == {"1": 1.5, "4": 1.5}
    assert len(written["predictions"]) == 14
    assert written["trials"][1]["looks_up"] is True
    assert {"batch_size": 4, "num_speculative_tokens": 4, "speedup": 1.5} in (
        written["trials"][1]["measured"]
    )
    # Of drafts of one at 1, 3, 4, 6, 7, 8 and 10 those at 1, 4, 8 and 10 are right.
    assert written["acceptance_by_exit_layer_and_length"]["1"][0] == pytest.approx(4 / 7)


@pytest.mark.parametrize("auto", [None, {1: 1.6, 4: 1.5}])
def test_picture_has_a_row_for_each_trial(tmp_path: Path, auto: dict[int, float] | None) -> None:
    figure = make_tuning_figure(make_report(auto=auto))
    speeds, kinds, *tried = figure.axes
    assert len(tried) == len(SIZES)
    assert [label.get_text() for label in kinds.get_yticklabels()] == ["lookup", "the exit alone"]
    names = ["E = 2", "E = 2, lookup", *(["the fastest, with K auto"] if auto else [])]
    assert [label.get_text() for label in tried[0].get_yticklabels()] == names
    assert len(speeds.texts) == 1 + 7 * 8  # the hint, and a number for each E and K
    draw_tuning(tmp_path / "tune.png", make_report(auto=auto))
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
