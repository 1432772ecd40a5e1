"""`make check-gpu`: layerskip on a machine with an NVIDIA GPU, in parts of under ten minutes each.

    python -m benchmarks.check_gpu tests     what is marked `gpu`, with kernels and CUDA graphs
    python -m benchmarks.check_gpu table     what drafts gain, for the shapes of Llama 1B and 8B

Needs no network, and of the plugin this folder alone. A part goes on after a failure. One folder
has all results: check-gpu.json, with those of both parts, check-gpu.png and check-gpu.log.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import layerskip_vllm
from layerskip_vllm.tools.hardware import describe_hardware
from layerskip_vllm.tools.output import write_json

ROOT = Path(__file__).parents[1]
# First what only a GPU shows; the rest as far as the time goes.
TESTS = ("tests/engine/features/test_gpu_features.py", "tests/engine", "tests/e2e/serving")
TEST_BUDGET_S = 480.0
TABLE_BUDGETS_S = {"gpu-1b": 290.0, "gpu-8b": 270.0}
_ALL_ON = "layerskip+auto+draft_vocab"
# Four engines of 8B with their KV caches would not fit into 80 GiB.
TABLE_SYSTEMS: Mapping[str, Sequence[str]] = {
    "gpu-1b": (
        *("plain", "layerskip", "layerskip+draft_vocab", "layerskip+reuse", "layerskip+lookup"),
        *("layerskip+auto", _ALL_ON, "draft_model"),
    ),
    "gpu-8b": ("plain", "layerskip", _ALL_ON),
}
TABLE_ARGS = (
    *("--batch-sizes", "1", "4", "16", "64"),
    *("--num-long-prompt-tokens", "14000"),
    *("--repeats", "3"),
)
# What may still be running when a test starts as the last one; and what a step has to write what it
# knows once it is interrupted.
_LAST_TEST_S, _LAST_WORDS_S = 40.0, 20.0


@dataclass(frozen=True)
class Step:
    """A command of a part.

    Attributes:
        name: What it is called in the report.
        command: Its words.
        budget_s: After this time it is interrupted.
        read: Its results from the file that the command has written, and whether all is well.
        result_path: That file.
    """

    name: str
    command: Sequence[str]
    budget_s: float
    read: Callable[[Path], tuple[bool, Mapping[str, Any]]]
    result_path: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and return 0 if everything in them was run and is well."""
    options = parse_check_options(arguments)
    if not torch.cuda.is_available():
        print(
            f"check-gpu: torch {torch.__version__} of {sys.executable} sees no GPU; elsewhere, "
            "`make test` needs none.",
            file=sys.stderr,
        )
        return 2
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    report_path = folder / "check-gpu.json"
    report = json.loads(report_path.read_text()) if report_path.exists() else {}
    report |= describe_machine()
    is_well = True
    with tempfile.TemporaryDirectory() as scratch, (folder / "check-gpu.log").open("a") as log:
        env = make_env(Path(scratch))
        for step in make_steps(options, Path(scratch)):
            report[step.name] = run_step(step, env, log)
            is_well &= report[step.name]["is_well"]
            write_json(report_path, report)
    is_well &= draw_tables(report, folder / "check-gpu.png")
    print(f"check-gpu: {'all is well' if is_well else 'NOT all is well'}; see {folder}/")
    return 0 if is_well else 1


def parse_check_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check_gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("part", choices=("tests", "table", "all"), nargs="?", default="all")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmark-output/gpu"))
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="files and folders")
    parser.add_argument("--test-budget-s", type=float, default=TEST_BUDGET_S, help="seconds")
    parser.add_argument("--presets", nargs="+", default=list(TABLE_BUDGETS_S), help="shapes")
    parser.add_argument(
        "--speedup-args", nargs=argparse.REMAINDER, default=[], help="the rest is the table's"
    )
    return parser.parse_args(arguments)


def describe_machine() -> dict[str, Any]:
    """Return what the figures are of."""
    names = ("vllm", "torch", "triton", "transformers")
    return {
        "gpu": torch.cuda.get_device_name(),
        "hardware": describe_hardware(),
        "layerskip_vllm": layerskip_vllm.__version__,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def make_env(folder: Path) -> dict[str, str]:
    """Return the environment of all steps: offline, and with the plugin of this repository.

    vLLM finds plugins by their metadata, which are written to `folder` where nobody has installed
    any.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    group = "vllm.general_plugins"
    if "layerskip" not in importlib.metadata.entry_points(group=group).names:
        version = layerskip_vllm.__version__
        info = folder / f"layerskip_vllm-{version}.dist-info"
        info.mkdir()
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        fields = {"Metadata-Version": "2.1", "Name": project["name"], "Version": version}
        (info / "METADATA").write_text("".join(f"{k}: {v}\n" for k, v in fields.items()))
        lines = (f"{name} = {value}" for name, value in project["entry-points"][group].items())
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        paths.append(str(folder))
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {
        **os.environ,
        **offline,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "ENGINE_JOB_TIMEOUT_S": "120",
    }


def make_steps(options: argparse.Namespace, scratch: Path) -> list[Step]:
    """Return the steps of the parts that were asked for; they write into `scratch`."""
    python, steps = sys.executable, []
    if options.part != "table":
        path, budget_s = scratch / "junit.xml", options.test_budget_s
        command = [python, "-m", "pytest", "-v", "-m", "gpu", *options.tests, f"--junitxml={path}"]
        command += ["-p", "no:cacheprovider", f"--budget-s={budget_s}"]
        steps.append(Step("tests", command, budget_s + _LAST_TEST_S, read_tests, path))
    for preset in options.presets if options.part != "tests" else ():
        path = scratch / f"{preset}.json"
        command = [python, "-m", "benchmarks.decoding.speedup", "--preset", preset]
        command += ["--dummy-weights", "--checkpoints", str(scratch), "--output", str(path)]
        systems = TABLE_SYSTEMS.get(preset, ("plain", "layerskip"))
        command += ["--systems", *systems, *TABLE_ARGS, *options.speedup_args]
        budget_s = TABLE_BUDGETS_S.get(preset, 300.0)
        steps.append(Step(f"table {preset}", command, budget_s, read_table, path))
    return steps


def run_step(step: Step, env: Mapping[str, str], log: Any) -> dict[str, Any]:
    """Run a step, its output on the terminal and in the log, and return what came out."""
    print(f"check-gpu: {step.name}, at most {step.budget_s:.0f} s", flush=True)
    # A shell has its background jobs ignore it, and so would what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start_s = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # all that it starts is ended with it
    )
    timers = [
        threading.Timer(step.budget_s + delay_s, os.killpg, (process.pid, signal_number))
        for delay_s, signal_number in ((0, signal.SIGINT), (_LAST_WORDS_S, signal.SIGKILL))
    ]
    for timer in timers:
        timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        status = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
    took_s = time.monotonic() - start_s
    is_well = status == 0
    results: Mapping[str, Any] = {}
    if step.result_path.exists():
        is_read_well, results = step.read(step.result_path)
        is_well &= is_read_well
    late = " (interrupted: its time was over)" if took_s >= step.budget_s else ""
    words = f"{'ok' if is_well else 'FAILED'} after {took_s:.0f} s, status {status}{late}"
    print(f"check-gpu: {step.name}: {words}", flush=True)
    return {"is_well": is_well, "status": status, "took_s": took_s, **results}


def read_tests(path: Path) -> tuple[bool, dict[str, Any]]:
    """Return whether all tests were run and none failed, and each one's outcome and seconds."""
    tests: dict[str, dict[str, Any]] = {}
    # One that was interrupted has no name.
    for case in ElementTree.parse(path).iterfind(".//testcase[@name]"):
        outcome = next(
            (child for child in case if child.tag in ("failure", "error", "skipped")), None
        )
        tests[f"{case.get('classname')}::{case.get('name')}"] = {
            "outcome": "passed" if outcome is None else outcome.tag,
            "why": None if outcome is None else (outcome.get("message") or "")[:500],
            "took_s": float(case.get("time", 0)),
        }
    late = [name for name, test in tests.items() if (test["why"] or "").startswith("not run")]
    return not late, {"num_not_run": len(late), "tests": tests}


def read_table(path: Path) -> tuple[bool, dict[str, Any]]:
    """Return what the benchmark has written."""
    return True, json.loads(path.read_text())


def draw_tables(report: Mapping[str, Any], path: Path) -> bool:
    """Draw all tables of the report, if there is one; return whether it could."""
    tables = {
        name.removeprefix("table "): part["summary"]
        for name, part in report.items()
        if name.startswith("table ") and "summary" in part
    }
    if not tables:
        return True
    try:
        from benchmarks.decoding.speedup_picture import make_speedup_figure
    except ImportError as error:
        print(f"check-gpu: no picture: {error}")
        return False
    make_speedup_figure(tables, report["gpu"]).savefig(path)
    return True


if __name__ == "__main__":
    sys.exit(main())
