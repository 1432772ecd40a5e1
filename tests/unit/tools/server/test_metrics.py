"""Counters of speculative decoding and what drafts, read from made-up Prometheus pages."""

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from layerskip_vllm.tools.server.metrics import LayerSkipInfo, SpecDecodeCounters, parse_sample

PAGE = """\
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 500.0
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.79e+09
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 300.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 180.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 90.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 60.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 30.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_created gauge
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",position="0"} 1.79e+09
"""


def read(page, **options):
    return SpecDecodeCounters.read(text_string_to_metric_families(page), **options)


def test_counters_are_all_read_when_a_server_drafts():
    assert read(PAGE) == SpecDecodeCounters(100, 300, 180, (90, 60, 30))


def test_counters_are_of_all_engines_or_of_one_when_there_are_several():
    page = PAGE + PAGE.replace('engine="0"', 'engine="1"')
    assert read(page) == SpecDecodeCounters(200, 600, 360, (180, 120, 60))
    assert read(page, engine=1) == SpecDecodeCounters(100, 300, 180, (90, 60, 30))
    assert read(page, engine=2) == SpecDecodeCounters()


def test_positions_are_sorted_as_numbers_when_there_are_more_than_ten():
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines = [line for line in PAGE.splitlines() if "per_pos" not in line]
    lines.append(f"# TYPE {name} counter")
    lines += [f'{name}{{position="{position}"}} {20 - position}' for position in range(12)]
    counters = read("\n".join(lines) + "\n")
    assert counters.num_accepted_tokens_per_pos == tuple(range(20, 8, -1))


def test_shares_are_of_whole_numbers_when_vllm_counts_no_drafts():
    """As it does where a grammar allows none of them, which may be accepted all the same."""
    for counters in (SpecDecodeCounters(5, 0, 20, (5, 5, 5, 5)), SpecDecodeCounters(5, 8, 20, ())):
        assert counters.acceptance_rate == 1
    none = SpecDecodeCounters(0, 0, 0, (0, 0))
    assert (none.acceptance_rate, none.mean_acceptance_length) == (0, 1)
    assert none.acceptance_by_position == (0, 0)
    assert SpecDecodeCounters(5, 0, 0, (0,)).acceptance_rate == 0


def test_sample_is_refused_when_the_server_does_not_speculate():
    page = "\n".join(line for line in PAGE.splitlines() if "spec_decode" not in line) + "\n"
    assert read(page) == SpecDecodeCounters()
    with pytest.raises(ValueError, match="no speculative decoding"):
        parse_sample(page, 0.0)


def test_counters_are_the_processs_own_when_no_page_is_given(monkeypatch):
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr("layerskip_vllm.tools.server.metrics.REGISTRY", registry)
    name = "vllm:spec_decode_num_accepted_tokens"
    prometheus_client.Counter(name, "", ["engine"], registry=registry).labels("0").inc(3)
    by_position = prometheus_client.Counter(
        f"{name}_per_pos", "", ["engine", "position"], registry=registry
    )
    for position, count in enumerate([2, 1]):
        by_position.labels("0", str(position)).inc(count)
    assert SpecDecodeCounters.read_own() == SpecDecodeCounters(0, 0, 3, (2, 1))


def test_info_is_read_when_a_server_says_what_drafts():
    gauge = (
        'vllm:layerskip_info{engine="0",exit_layer="8",exit_layer_source="the user",'
        'num_speculative_tokens="3",num_speculative_tokens_source="the checkpoint",'
        'num_layers="24",exit_adapter="",draft_vocab_size="512",lookup="off",'
        'reuse_exit_states="auto"} 1.0\n'
    )
    info = parse_sample(PAGE + gauge, 0.0).info
    assert info == LayerSkipInfo(
        exit_layer=8,
        exit_layer_source="the user",
        num_speculative_tokens=3,
        num_speculative_tokens_source="the checkpoint",
        num_layers=24,
        exit_adapter="",
        draft_vocab_size=512,
        lookup="off",
        reuse_exit_states="auto",
    )
    assert parse_sample(PAGE, 0.0).info is None


def test_difference_gives_acceptance_since_then():
    before = SpecDecodeCounters(50, 150, 100, (45, 35, 20))
    counters = SpecDecodeCounters(100, 300, 180, (90, 60, 30)) - before
    assert counters == SpecDecodeCounters(50, 150, 80, (45, 25, 10))
    assert counters.acceptance_by_position == (0.9, 0.5, 0.2)
    assert counters.mean_acceptance_length == pytest.approx(1 + 80 / 50)
