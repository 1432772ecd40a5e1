"""The stopwatch of `benchmarks.decoding.draft_step`, the functions it times, and its table."""

import contextlib
import io
from pkgutil import resolve_name

import pytest
from rich.console import Console

from benchmarks.decoding import draft_step
from benchmarks.decoding.draft_step import (
    DRAFT_PARTS,
    STEP_PARTS,
    Stopwatch,
    Timing,
    make_step_table,
)


class Clock:
    now_s = 0.0


def work(seconds):
    Clock.now_s += seconds


def target():
    work(2)


def head():
    work(1)


@contextlib.contextmanager
def set_forward_context():
    work(0.25)
    yield
    work(0.25)


def draft():
    work(4)
    with set_forward_context():
        work(8)
        head()


def step():
    work(16)
    with set_forward_context():
        target()
    head()
    draft()


@pytest.fixture
def stopwatch(monkeypatch):
    monkeypatch.setattr("time.thread_time", lambda: Clock.now_s)
    for function in (target, head, set_forward_context, draft, step):
        monkeypatch.setitem(globals(), function.__name__, function)  # put back what is watched
    monkeypatch.setattr(draft_step, "DRAFT_PARTS", {"a draft": ()})
    monkeypatch.setattr(draft_step, "STEP_PARTS", {"head": (), "context": ()})
    stopwatch = Stopwatch()
    for part, name in {
        "target": "target",
        "head": "head",
        "context": "set_forward_context",
        "a draft": "draft",
        "the rest": "step",
    }.items():
        stopwatch.watch(part, f"{__name__}:{name}")
    return stopwatch


def test_stopwatch_counts_nothing_twice_and_a_drafts_own_for_the_draft(stopwatch):
    for _ in range(2):
        step()
        assert {part: seconds for part, seconds in stopwatch.take().items() if part} == {
            "the rest": 16,
            "context": 0.5,
            "target": 2,
            "head": 1,
            "a draft": 4 + 0.5 + 8 + 1,
        }


def test_functions_of_all_parts_are_there():
    names = [
        name for parts in (DRAFT_PARTS, STEP_PARTS) for part in parts.values() for name in part
    ]
    assert all(callable(resolve_name(name)) for name in names)


def test_table_says_what_the_times_come_to():
    parts = dict.fromkeys([*DRAFT_PARTS, *STEP_PARTS], 0.0)
    plain = Timing(parts | {"target": 1000.0}, tokens_per_step=1.0)
    layerskip = Timing(parts | {"target": 1200.0, "draft: head": 300.0}, tokens_per_step=3.0)
    console = Console(width=100, file=io.StringIO())
    console.print(make_step_table(8, plain, layerskip))
    text = console.file.getvalue()
    for part in ("8 at once", "1000", "1500", "300", "3.00", "2.00"):
        assert part in text
