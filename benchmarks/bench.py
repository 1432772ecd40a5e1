"""`make bench`: layerskip and its peers side by side, offline and served, with a report.

    python -m benchmarks.bench                       all studies, half an hour on two cores
    python -m benchmarks.bench --studies code grid   some of them

Each study is a run of its own in which all systems take turns. `benchmarks/results/` gets the JSON
of each, one report in Markdown and the pictures.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.bench_report import draw_grid, draw_memory, write_report
from benchmarks.decoding.speedup_picture import make_speedup_figure
from benchmarks.serving.bench_serve import bench_servers
from benchmarks.serving.vllm_command import PLAIN
from layerskip_vllm.tools.hardware import describe_hardware
from layerskip_vllm.tools.output import write_json

EMBEDDED = "checkpoints/stdlib-24l"
RESULTS = Path("benchmarks/results")
SCRATCH = Path("benchmark-output/bench")
# layerskip as it ships, with each of its speed settings, and its peers.
OWN = ("layerskip", "layerskip+auto", "layerskip+lookup", "layerskip+reuse")
PEERS = ("draft_model", "ngram", "suffix", "transformers", "transformers_early_exit")
GRID = [(exit_layer, k) for exit_layer in (2, 4, 6, 8, 12) for k in (2, 4, 8)]
# The offline studies: what `benchmarks.decoding.speedup` is told, but for the systems.
STUDIES: Mapping[str, tuple[str, Sequence[str]]] = {
    "code": (
        "The embedded checkpoint on held-out code",
        (
            *("--model", EMBEDDED, "--dtype", "float32", "--num-prompt-tokens", "64"),
            *("--batch-sizes", "1", "2", "4", "8", "16", "32", "--repeats", "3"),
        ),
    ),
    "scale": (
        "Random weights of 0.6 B, whose drafts of 4 are accepted at 73 %",
        (
            *("--preset", "cpu-0.6b", "--batch-sizes", "1", "4", "16", "32"),
            *("--max-tokens", "48", "--repeats", "3"),
        ),
    ),
    "grid": (
        "The embedded checkpoint on held-out code, by E and K, one request",
        (
            *("--model", EMBEDDED, "--dtype", "float32", "--num-prompt-tokens", "64"),
            *("--batch-sizes", "1", "--repeats", "3"),
        ),
    ),
}
SERVED = "served"
CLIENTS = (1, 4, 16, 64)
SERVED_SYSTEMS: Mapping[str, Sequence[str]] = {
    PLAIN: (),
    "layerskip": (),
    "layerskip+auto": ("--num-speculative-tokens=auto",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the studies, and write the report of all that are there."""
    options = parse_bench_options(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.studies:
        print(f"bench: {name}", flush=True)
        file = RESULTS / f"{name}.json"
        write_json(
            file, describe_circumstances() | (run_served() if name == SERVED else run_study(name))
        )
    write_all(RESULTS)
    print(f"bench: see {RESULTS}/report.md")
    return 0


def parse_bench_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = [*STUDIES, SERVED]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--studies", nargs="*", choices=names, default=names)
    return parser.parse_args(arguments)


def describe_circumstances() -> dict[str, Any]:
    """Return what all figures of a file are of."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    packages = ("vllm", "torch", "transformers")
    return {
        "revision": commit.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
        "hardware": describe_hardware(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def run_study(name: str) -> dict[str, Any]:
    """Run an offline study in a process of its own, and return its command and figures."""
    title, words = STUDIES[name]
    output = SCRATCH / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "benchmarks.decoding.speedup", *words]
    command += ["--systems", *choose_systems(name), "--output", str(output)]
    subprocess.run([sys.executable, *command[1:]], check=True)
    return {"title": title, "command": shlex.join(command), **json.loads(output.read_text())}


def choose_systems(name: str) -> list[str]:
    """Return the systems of a study; a peer whose package is not installed is left out aloud."""
    if name == "grid":
        return ["plain", *(f"layerskip+E{exit_layer}+K{k}" for exit_layer, k in GRID)]
    # All engines of a study are in memory at the same time.
    peers = PEERS if name == "code" else ("draft_model",)
    systems = ["plain", *OWN, *peers]
    if name == "scale":  # random texts repeat nothing
        systems[systems.index("layerskip+lookup")] = "layerskip+auto+reuse"
    if "suffix" in systems and find_spec("arctic_inference") is None:
        print("bench: suffix is left out: arctic-inference is not installed", flush=True)
        systems.remove("suffix")
    return systems


def run_served() -> dict[str, Any]:
    """Ask servers by `vllm bench serve`, and return the figures."""
    results = bench_servers(EMBEDDED, "float32", SERVED_SYSTEMS, CLIENTS, SCRATCH / SERVED)
    return {
        "title": "The embedded checkpoint served, `vllm bench serve`",
        "command": f"python -m benchmarks.bench --studies {SERVED}",
        "served": [asdict(result) for result in results],
    }


def write_all(folder: Path) -> None:
    """Write the report and the pictures of all studies whose JSON is in a folder."""
    files = {name: folder / f"{name}.json" for name in (*STUDIES, SERVED)}
    studies = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    for name, study in studies.items():
        if name == "grid":
            draw_grid(study).savefig(folder / "grid.png")
        elif name != SERVED:
            picture = make_speedup_figure({study["title"]: study["summary"]}, study["hardware"])
            picture.savefig(folder / f"{name}.png")
            draw_memory(study).savefig(folder / f"{name}-memory.png")
    write_report(studies, folder / "report.md")


if __name__ == "__main__":
    sys.exit(main())
