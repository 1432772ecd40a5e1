"""Memory: that of a process and its children, and when it counts as growing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from layerskip_vllm.tools.server.metrics import Sample, SpecDecodeCounters
from layerskip_vllm.tools.soak.monitor import Look, measure_growth_mib, read_memory_mib

SAMPLE = Sample(0.0, {"vllm:kv_cache_usage_perc": 0.0}, SpecDecodeCounters(0, 0, 0, ()))


def looks(memory: Sequence[float | None]) -> list[Look]:
    return [Look(float(at), SAMPLE, mib) for at, mib in enumerate(memory)]


def test_memory_includes_children_when_there_are_any() -> None:
    before = read_memory_mib(os.getpid())
    hold = "import sys; held = bytearray(64 << 20); print(1, flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    assert read_memory_mib(os.getpid()) > before + 64
    child.communicate()


def test_growth_is_that_of_the_second_half_when_memory_rises_at_first() -> None:
    warming_up = [500.0 + 10 * at for at in range(50)]
    assert measure_growth_mib(looks([*warming_up, *[1000.0] * 50])) == 0


def test_growth_is_seen_when_memory_rises_to_the_end() -> None:
    assert measure_growth_mib(looks([1000.0 + at for at in range(120)])) == pytest.approx(40)


def test_growth_is_none_when_there_are_too_few_looks() -> None:
    assert measure_growth_mib(looks([1.0] * 11)) is None
    assert measure_growth_mib(looks([None] * 100)) is None
