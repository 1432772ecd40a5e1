"""Counters of speculative decoding, read from made-up Prometheus pages."""

import pytest

from layerskip_vllm.tools.server.counters import SpecDecodeCounters, parse_spec_decode_counters

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


def test_parse_reads_every_counter():
    assert parse_spec_decode_counters(PAGE) == SpecDecodeCounters(100, 300, 180, (90, 60, 30))


def test_parse_sums_over_engines():
    page = PAGE + PAGE.replace('engine="0"', 'engine="1"')
    assert parse_spec_decode_counters(page) == SpecDecodeCounters(200, 600, 360, (180, 120, 60))


def test_parse_sorts_positions_as_numbers_when_there_are_more_than_ten():
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines = [line for line in PAGE.splitlines() if "per_pos" not in line]
    lines.append(f"# TYPE {name} counter")
    lines += [f'{name}{{position="{position}"}} {20 - position}' for position in range(12)]
    counters = parse_spec_decode_counters("\n".join(lines) + "\n")
    assert counters.num_accepted_tokens_per_pos == tuple(range(20, 8, -1))


def test_parse_raises_when_the_server_does_not_speculate():
    page = "\n".join(line for line in PAGE.splitlines() if "spec_decode" not in line) + "\n"
    with pytest.raises(ValueError, match="no speculative decoding"):
        parse_spec_decode_counters(page)


def test_difference_gives_acceptance_since_then():
    before = SpecDecodeCounters(50, 150, 100, (45, 35, 20))
    counters = SpecDecodeCounters(100, 300, 180, (90, 60, 30)) - before
    assert counters == SpecDecodeCounters(50, 150, 80, (45, 25, 10))
    assert counters.acceptance_by_position == (0.9, 0.5, 0.2)
    assert counters.tokens_per_step == pytest.approx(1 + 80 / 50)
