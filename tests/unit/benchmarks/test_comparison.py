"""Medians, speed-up and equality of tokens from made-up rounds; headline, table, JSON, picture."""

import io
import itertools
import json

import pytest
from matplotlib.text import Text
from rich.console import Console

from benchmarks.serving.client import Completion, Round
from benchmarks.serving.comparison import Mismatch, compare_rounds, summarize_speed
from benchmarks.serving.picture import make_demo_figure
from benchmarks.serving.report import (
    RunSetting,
    build_table,
    comparisons_to_json,
    describe_gains,
    is_every_token_same,
)
from layerskip_vllm.tools.server.metrics import LayerSkipInfo, SpecDecodeCounters

COUNTERS = SpecDecodeCounters(10, 40, 20, (9, 6, 4, 1))
SETTING = RunSetting(
    model="checkpoints/stdlib-24l",
    drafting=LayerSkipInfo(
        exit_layer=4,
        exit_layer_source="checkpoint",
        num_speculative_tokens=4,
        num_speculative_tokens_source="user",
        num_layers=24,
        exit_adapter="",
        draft_vocab_size=2048,
        lookup="off",
        reuse_exit_states="off",
    ),
    dtype="float32",
    num_prompts=2,
    num_rounds=3,
    max_tokens=5,
    hardware="A Processor, 2 cores",
    versions={"vLLM": "0.32.0"},
    commands={"plain": "vllm serve m", "layerskip": "vllm serve m --speculative-model=layerskip"},
)


def make_round(*token_ids, duration_s=1.0, ttft_s=0.1, latency_s=0.5):
    return Round(tuple(Completion(tuple(ids), ttft_s, latency_s) for ids in token_ids), duration_s)


def make_comparison(layerskip_token_ids=(1, 2, 3, 4, 5), concurrency=2):
    plain = [make_round((1, 2, 3, 4, 5), (6, 7), duration_s=seconds) for seconds in (1, 2, 4)]
    layerskip = [
        make_round(layerskip_token_ids, (6, 7), duration_s=seconds) for seconds in (0.5, 1.6, 1.6)
    ]
    return compare_rounds(concurrency, plain, layerskip, COUNTERS)


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


def test_compare_divides_the_medians_that_it_shows():
    comparison = make_comparison()
    assert comparison.plain.tokens_per_s == pytest.approx(7 / 2)
    assert comparison.layerskip.tokens_per_s == pytest.approx(7 / 1.6)
    assert comparison.speedup == pytest.approx(2 / 1.6)
    assert is_every_token_same([comparison])
    assert comparison.num_tokens == 21
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
    assert not is_every_token_same([make_comparison(), comparison])
    assert comparison.mismatches[0] == mismatch
    assert [found.prompt_index for found in comparison.mismatches] == [0, 2, 4]


def test_compare_raises_when_nothing_was_drafted():
    rounds = [make_round((1, 2))]
    with pytest.raises(ValueError, match="drafted nothing"):
        compare_rounds(1, rounds, rounds, SpecDecodeCounters(0, 0, 0, (0,)))


def test_headline_says_what_one_and_many_gain_and_that_no_token_changes():
    one, many = make_comparison(concurrency=1), make_comparison(concurrency=8)
    assert describe_gains([one, many]) == (
        "one request: 1.25 times plain vLLM (4 against 4 tokens a second); "
        "8 requests: 1.25 times plain vLLM (4 against 4 tokens a second); all 42 tokens the same"
    )


def test_headline_says_where_when_tokens_differ():
    comparisons = [make_comparison(concurrency=1), make_comparison((1, 2, 9, 4, 5))]
    assert describe_gains(comparisons).endswith(
        "TOKENS DIFFER in 3 of 12 completions, first with 2 requests in prompt 0 at token 2"
    )


def test_table_says_what_was_measured_and_on_what():
    console = Console(width=100, file=io.StringIO())
    console.print(build_table([make_comparison(concurrency=1), make_comparison()], SETTING))
    text = console.file.getvalue()
    for part in (
        "one request",
        "2 requests",
        "1.25x",
        "2 to 7",
        "4 to 14",
        "90% 60% 40% 10%",
        "3.00",
        "first 4 of 24 layers",
        "A Processor, 2 cores",
    ):
        assert part in text


def test_json_holds_the_result_and_the_commands():
    content = comparisons_to_json(
        [make_comparison(concurrency=1), make_comparison((1, 9))], SETTING
    )
    result = json.loads(json.dumps(content))
    assert result["every_token_same"] is False
    assert result["headline"].startswith("one request: 1.25 times")
    assert [each["concurrency"] for each in result["comparisons"]] == [1, 2]
    assert result["comparisons"][1]["mismatches"][0]["position"] == 1
    assert result["comparisons"][0]["acceptance_by_position"] == [0.9, 0.6, 0.4, 0.1]
    assert result["setting"]["drafting"]["num_speculative_tokens_source"] == "user"
    assert result["setting"]["commands"]["plain"] == "vllm serve m"


@pytest.mark.parametrize("loads", [(1,), (1, 8), (16, 128, 256)])
def test_picture_is_a_png_without_a_text_past_its_edge_or_on_another(loads, tmp_path):
    comparisons = [make_comparison(concurrency=concurrency) for concurrency in loads]
    figure = make_demo_figure(comparisons, SETTING)
    figure.savefig(tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    boxes = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text()]
    boxes = [box for box in boxes if box.width > 1]  # what is hidden has a box of one
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
