"""A public name of a module means one thing, wherever it stands."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("layerskip_vllm", "benchmarks", "checkpoints/stdlib", "scripts")
# A program's start, its command line, the writer of a generated page, and what an engine's process
# of the benchmarks is asked, whoever's engine it is.
MEANS_THE_SAME = {"main", "parse_args", "write_page", "load", "run_round"}


def test_public_names_stand_once_when_they_mean_different_things() -> None:
    files = defaultdict(list)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    files[node.name].append(path.relative_to(ROOT).as_posix())
    twice = {
        name: found
        for name, found in files.items()
        if len(found) > 1 and not name.startswith("_") and name not in MEANS_THE_SAME
    }
    assert twice == {}
