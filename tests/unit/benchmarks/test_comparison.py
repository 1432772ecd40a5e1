"""Medians, speed-up and equality of tokens from made-up rounds."""

import io
import json

import pytest
from rich.console import Console

from benchmarks.serving.client import Completion, Round
from benchmarks.serving.comparison import Mismatch, compare, count_same_tokens, summarize_speed
from benchmarks.serving.picture import draw_comparison
from benchmarks.serving.report import RunSetting, build_table, write_json
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters

COUNTERS = SpecDecodeCounters(10, 40, 20, (9, 6, 4, 1))
SETTING = RunSetting(
    model="checkpoints/stdlib-24l",
    exit_layer=4,
    num_layers=24,
    num_speculative_tokens=4,
    dtype="float32",
    num_prompts=2,
    num_rounds=3,
    max_tokens=5,
    concurrency=2,
    hardware="A Processor, 2 cores",
    versions={"vLLM": "0.32.0"},
    commands={"plain": "vllm serve m", "layerskip": "vllm serve m --speculative-model=layerskip"},
)


def make_round(*token_ids, duration_s=1.0, ttft_s=0.1, latency_s=0.5):
    return Round(
        tuple(Completion("", tuple(ids), ttft_s, latency_s) for ids in token_ids), duration_s
    )


def make_comparison(layerskip_token_ids=(1, 2, 3, 4, 5)):
    plain = [make_round((1, 2, 3, 4, 5), (6, 7), duration_s=seconds) for seconds in (1, 2, 4)]
    layerskip = [
        make_round(layerskip_token_ids, (6, 7), duration_s=seconds) for seconds in (0.5, 1.6, 1.6)
    ]
    return compare(plain, layerskip, COUNTERS)


def test_summarize_speed_takes_medians():
    rounds = [
        make_round((1, 2, 3), duration_s=1.0, ttft_s=0.1, latency_s=0.3),
        make_round((1, 2, 3), duration_s=3.0, ttft_s=0.2, latency_s=0.8),
        make_round((1, 2, 3), duration_s=0.5, ttft_s=0.9, latency_s=1.9),
    ]
    speed = summarize_speed(rounds)
    assert speed.tokens_per_s == 3.0
    assert speed.ttft_ms == pytest.approx(200)
    assert speed.tpot_ms == pytest.approx(300)
    assert speed.tokens_per_s_by_round == (3.0, 1.0, 6.0)


def test_summarize_speed_raises_when_no_completion_has_two_tokens():
    with pytest.raises(ValueError, match="max-tokens"):
        summarize_speed([make_round((1,))])


@pytest.mark.parametrize(
    ("plain", "layerskip", "num_same"),
    [((), (), 0), ((1, 2), (1, 2), 2), ((1, 2, 3), (1, 9, 3), 1), ((1, 2), (1, 2, 3), 2)],
)
def test_count_same_tokens(plain, layerskip, num_same):
    assert count_same_tokens(plain, layerskip) == num_same


def test_compare_divides_the_medians_that_it_shows():
    comparison = make_comparison()
    assert comparison.plain.tokens_per_s == pytest.approx(7 / 2)
    assert comparison.layerskip.tokens_per_s == pytest.approx(7 / 1.6)
    assert comparison.speedup == pytest.approx(2 / 1.6)
    assert comparison.is_every_token_same
    assert comparison.num_tokens == comparison.num_same_tokens == 21
    assert comparison.num_completions == 6


@pytest.mark.parametrize(
    ("layerskip_token_ids", "mismatch"),
    [
        ((1, 2, 9, 4, 5), Mismatch(0, 2, 3, 9)),
        ((1, 2, 3, 4), Mismatch(0, 4, 5, None)),
        ((1, 2, 3, 4, 5, 6), Mismatch(0, 5, None, 6)),
    ],
)
def test_compare_names_the_first_difference_when_tokens_differ(layerskip_token_ids, mismatch):
    comparison = make_comparison(layerskip_token_ids)
    assert not comparison.is_every_token_same
    assert comparison.mismatches[0] == mismatch
    assert [found.prompt_index for found in comparison.mismatches] == [0, 2, 4]


def test_compare_raises_when_nothing_was_drafted():
    rounds = [make_round((1, 2))]
    with pytest.raises(ValueError, match="drafted nothing"):
        compare(rounds, rounds, SpecDecodeCounters(0, 0, 0, (0,)))


def render(comparison):
    console = Console(width=100, file=io.StringIO())
    console.print(build_table(comparison, SETTING))
    return console.file.getvalue()


def test_table_says_what_was_measured_and_on_what():
    text = render(make_comparison())
    for part in (
        "1.25x",
        "2 to 7",
        "4 to 14",
        "90.0%",
        "10.0%",
        "3.00",
        "yes, all 21",
        "A Processor, 2 cores",
    ):
        assert part in text


def test_table_says_no_when_tokens_differ():
    assert "NO, 3 of 6 completions differ; prompt 0 at token 2" in render(
        make_comparison((1, 2, 9, 4, 5))
    )


def test_json_holds_the_result_and_the_commands(tmp_path):
    write_json(tmp_path / "demo.json", make_comparison((1, 9)), SETTING)
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["every_token_same"] is False
    assert result["mismatches"][0]["position"] == 1
    assert result["acceptance_by_position"] == [0.9, 0.6, 0.4, 0.1]
    assert result["setting"]["commands"]["plain"] == "vllm serve m"


def test_picture_is_a_png(tmp_path):
    draw_comparison(tmp_path / "demo.png", make_comparison(), SETTING)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
