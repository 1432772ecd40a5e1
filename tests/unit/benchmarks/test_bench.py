"""`make bench`: which systems it asks, and what its report says of their figures."""

import json
from dataclasses import asdict

import pytest

from benchmarks import bench
from benchmarks.bench import STUDIES, choose_systems, write_all
from benchmarks.decoding.engines import Facts, Measurement
from benchmarks.decoding.speedup import parse_options
from benchmarks.decoding.speedup_summary import Load, summarize
from benchmarks.decoding.weight_counts import WeightCounts
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters

FACTS = asdict(Facts(2**30, 4096, "cpu", "compiled", 2, start_s=12.0))
ABOUT = {
    "title": "A study",
    "command": "python -m benchmarks.decoding.speedup",
    "revision": "abc1234",
    "date": "2026-11-30",
    "hardware": "a machine",
    "versions": {"vllm": "0.32.0"},
}


def study(monkeypatch, **tokens_per_s):
    """A study's JSON, in which drafts of 4 have 3 accepted, with one round of each system."""
    monkeypatch.setattr("benchmarks.decoding.speedup.list_gpu_names", list)
    options = parse_options(["--preset", "tiny"])
    drafts = SpecDecodeCounters(10, 40, 30, (10, 10, 10, 0))
    rounds = {
        system: [
            Measurement(
                speed,
                0.1,
                1.0,
                SpecDecodeCounters() if system == "plain" else drafts,
                [[1, 2]],
                (0.004, 0.002),
            )
        ]
        for system, speed in tokens_per_s.items()
    }
    counts = WeightCounts(layer=10, head=5, embedding=5, num_layers=4)
    lines = summarize({Load(1, 16): rounds}, counts, options)
    return ABOUT | {
        "conditions": ["two rounds"],
        "summary": [asdict(line) for line in lines],
        "engines": dict.fromkeys(tokens_per_s, FACTS),
    }


@pytest.fixture
def report(monkeypatch, tmp_path):
    def write(name, content):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        write_all(tmp_path)
        return (tmp_path / "report.md").read_text()

    return write


def test_report_says_first_where_layerskip_loses(monkeypatch, report, tmp_path):
    tokens_per_s = {"plain": 100.0, "layerskip": 80.0, "ngram": 120.0, "draft_model": 70.0}
    text = report("code", study(monkeypatch, **tokens_per_s))
    losses = [line for line in text.splitlines() if line.startswith("- layerskip loses")]
    assert losses == [
        "- layerskip loses at batch 1: ngram is 1.50 times as fast.",
        "- layerskip loses at batch 1: plain is 1.25 times as fast.",
    ]
    assert text.index(losses[-1]) < text.index("| batch |")
    assert "| 1 | layerskip | 80.0 | 80.0-80.0 | 0.80 | 3.00 of 4 | 1.00 1.00 1.00 0.00 |" in text
    assert "| 3.00 | 4.00 |" in text  # a token's median and 99 %, in milliseconds
    assert (tmp_path / "code.png").stat().st_size > 10_000
    assert (tmp_path / "code-memory.png").stat().st_size > 10_000


def test_report_says_so_when_layerskip_loses_nowhere(monkeypatch, report):
    text = report("scale", study(monkeypatch, plain=100.0, layerskip=180.0))
    assert "- layerskip is the fastest at every batch size." in text
    assert "loses" not in text


def test_grid_is_drawn_by_exit_and_length(monkeypatch, report, tmp_path):
    speeds = {"plain": 100.0, "layerskip+E2+K2": 90.0, "layerskip+E2+K4": 140.0}
    text = report("grid", study(monkeypatch, **speeds))
    assert "![grid](grid.png)" in text
    assert (tmp_path / "grid.png").stat().st_size > 10_000


def test_served_figures_are_beside_plains_of_the_same_load(report):
    def line(system, num_clients, throughput):
        names = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")
        result = dict.fromkeys(names, 5.0) | {
            "output_throughput": throughput,
            "spec_decode_acceptance_rate": None if system == "plain" else 71.6,
        }
        return {
            "system": system,
            "dataset": "custom",
            "num_clients": num_clients,
            "result": result,
        }

    lines = [line("plain", 1, 100.0), line("layerskip", 1, 130.0)]
    lines += [line("plain", 4, 200.0), line("layerskip", 4, 190.0)]
    text = report("served", ABOUT | {"served": lines})
    assert "| custom | 1 | layerskip | 130.0 | 1.30 |" in text
    assert "| custom | 4 | layerskip | 190.0 | 0.95 |" in text
    losses = [line for line in text.splitlines() if line.startswith("- layerskip loses")]
    assert losses == ["- layerskip loses with 4 clients on custom: 0.95 times plain."]
    assert text.count("| 72 |") == 2


@pytest.mark.parametrize("name", STUDIES)
def test_systems_of_each_study_are_known(name, monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda package: None)
    systems = choose_systems(name)
    assert parse_options([*STUDIES[name][1], "--systems", *systems]).systems == systems
    assert "suffix" not in systems
    assert ("suffix is left out" in capsys.readouterr().out) == (name == "code")
