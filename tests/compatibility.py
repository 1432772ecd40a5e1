"""Writes docs/compatibility.md from the tests' `feature` marks: `python -m tests.compatibility`.

A test says which feature of vLLM it shows beside layerskip, and on which model runners:

    @pytest.mark.feature("Requests", "stop strings")

Both may name parameters of the test, as in "{architecture}". The runners are those that it is
parametrised on, or `runners=("v1",)`; a test that shows a refusal says `is_refused=True`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/compatibility.md"
RUNNERS = ("v1", "v2")

_INTRODUCTION = """# What works beside layerskip

Made by `python -m tests.compatibility` from the tests that are named in it; a test compares the
two. "tested" means that the test runs real engines on that model runner, in most of them for the
same tokens as plain vLLM; "refused" that layerskip or vLLM itself refuses it, by an error that
names it; an empty field that no test says anything. Model Runner V2 is tested on a CPU, under
Triton's interpreter, and drafts with asynchronous scheduling, as on GPUs. Nothing in this table was
run on a GPU.
"""

_NOTES = """
## What vLLM itself leaves out

- Sleep mode and offloading the KV cache to memory (`OffloadingConnector`) need a GPU. Offloading
  was run on a stand-in for one (`make check-null-gpu`), sleep mode was not run.
- On the CPU, requests without an adapter get that of the last LoRA slot once `max_loras` adapters
  are loaded, with speculation or without; leave a slot free (`max_loras` one higher).
- On the CPU, weights of four bits need bfloat16, where ties make greedy tokens differ between
  batches of other shapes.
"""


@dataclass
class Feature:
    """A row of the table.

    Attributes:
        area: The section that it belongs to.
        name: What a user would call it.
        outcomes: By runner, "tested" or "refused".
        files: The test files that say so.
    """

    area: str
    name: str
    outcomes: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)


class Collector:
    """A pytest plugin that reads the marks of what is collected."""

    def __init__(self) -> None:
        self.features: dict[tuple[str, str], Feature] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Read every item's marks."""
        for item in items:
            for mark in item.iter_markers("feature"):
                parameters = item.callspec.params if hasattr(item, "callspec") else {}
                area, name = (text.format_map(parameters) for text in mark.args)
                feature = self.features.setdefault((area, name), Feature(area, name))
                outcome = "refused" if mark.kwargs.get("is_refused") else "tested"
                runners = mark.kwargs.get("runners") or _runners_of(item)
                feature.outcomes |= dict.fromkeys(runners, outcome)
                feature.files.add(item.path.relative_to(ROOT).as_posix())


def _runners_of(item: pytest.Item) -> Iterable[str]:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    found = [value for value in parameters if value in RUNNERS]
    if not found:
        raise pytest.UsageError(f"{item.nodeid}: its feature mark needs runners=(...).")
    return found


def write_page(features: Iterable[Feature]) -> str:
    """Write the page: a table for each area, in the order of the tests.

    Args:
        features: The rows.

    Returns:
        The page as Markdown.
    """
    sections: dict[str, list[str]] = {}
    for feature in features:
        outcomes = " | ".join(feature.outcomes.get(runner, "") for runner in RUNNERS)
        files = ", ".join(f"[{Path(file).stem}](../{file})" for file in sorted(feature.files))
        row = f"| {feature.name} | {outcomes} | {files} |"
        sections.setdefault(feature.area, []).append(row)
    head = "| | Model Runner V1 | Model Runner V2 | test |\n|---|---|---|---|\n"
    tables = [
        f"\n## {area}\n\n{head}" + "\n".join(sorted(rows))
        for area, rows in sorted(sections.items())
    ]
    return _INTRODUCTION + "\n".join(tables) + "\n" + _NOTES


def collect() -> str:
    """Collect the tests that have marks, and write the page of them."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(path) for path in files if "mark.feature(" in path.read_text()]
    collector = Collector()
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main(["--collect-only", "-q", *marked], plugins=[collector])
    if status:
        raise SystemExit(int(status))
    return write_page(collector.features.values())


def page_of_the_tests() -> str:
    """The page as the tests give it, collected in a process of its own."""
    command = [sys.executable, "-m", "tests.compatibility", "--print"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout


if __name__ == "__main__":
    page = collect()
    if "--print" in sys.argv:
        sys.stdout.write(page)
    else:
        PAGE.write_text(page)
