"""That the plugin is in every process of a real server, and what loading it imports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerskip_vllm.hooks.method_hooks import METHOD_HOOKS
from tests.e2e.serving.server import ModelServer, environment

ARGS_HOOKS = {hook.target for hook in METHOD_HOOKS if ":EngineArgs." in hook.target}
V1_HOOK = "vllm.v1.spec_decode.draft_model:DraftModelProposer.__new__"

# A general plugin of the test's own: keeps writing down how far the hooks are in its process.
PROBE = """
import json, multiprocessing, os, threading, time
from pathlib import Path

def register():
    threading.Thread(target=report, daemon=True).start()

def report():
    from layerskip_vllm.hooks.install import Hook, hook_state
    from layerskip_vllm.plugin import LEDGER
    hooks = [entry for entry in LEDGER if isinstance(entry, Hook)]
    file = Path(os.environ["VLLM_TEST_PROBE"]) / f"{os.getpid()}.json"
    while True:
        states = {hook.target: hook_state(hook) for hook in hooks}
        name = multiprocessing.current_process().name
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps({"name": name, "parent": os.getppid(), "states": states}))
        temporary.rename(file)
        time.sleep(1)
"""

YAML = """
tensor_parallel_size: 2
speculative-config:
  method: layerskip
  exit_layer: 4
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the probe as an installed package."""
    site = tmp_path_factory.mktemp("probe")
    (site / "layerskip_probe.py").write_text(PROBE)
    metadata = site / "layerskip_probe-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: layerskip-probe\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nlayerskip_probe = layerskip_probe:register\n"
    )
    return site


@pytest.fixture(scope="module")
def server(
    checkpoint: Callable[..., Path], probe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelServer]:
    """A server with two tensor-parallel workers, configured by a YAML file."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "config.yaml").write_text(YAML)
    variables = {
        "PYTHONPATH": str(probe),
        "VLLM_TEST_PROBE": str(folder),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    with ModelServer(
        folder,
        str(checkpoint("llama")),
        "--config",
        str(folder / "config.yaml"),
        "--spec_tokens=5",
        variables=variables,
    ) as server:
        server.complete("hello", max_tokens=30, ignore_eos=True)
        time.sleep(2)  # for the probes to write once more
        yield server


@pytest.fixture(scope="module")
def processes(server: ModelServer) -> dict[int, dict[str, Any]]:
    """What the probes have written, by process."""
    return {int(file.stem): json.loads(file.read_text()) for file in server.folder.glob("*.json")}


def find(processes: dict[int, dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    return {pid: process for pid, process in processes.items() if name in process["name"]}


@pytest.mark.engine
def test_plugin_is_loaded_in_the_api_server_when_serving(
    server: ModelServer, processes: dict[int, dict[str, Any]]
) -> None:
    states = processes[server.pid]["states"]
    assert {states[target] for target in ARGS_HOOKS} == {"applied"}
    assert set(states.values()) <= {"applied", "armed"}


@pytest.mark.engine
def test_plugin_is_loaded_in_the_engine_core_when_serving(
    server: ModelServer, processes: dict[int, dict[str, Any]]
) -> None:
    (core,) = find(processes, "EngineCore").values()
    assert core["parent"] == server.pid
    assert set(core["states"].values()) <= {"applied", "armed"}


@pytest.mark.engine
def test_plugin_is_loaded_in_each_worker_when_serving_with_tensor_parallelism(
    processes: dict[int, dict[str, Any]],
) -> None:
    (core,) = find(processes, "EngineCore")
    workers = find(processes, "Worker")
    assert len(workers) == 2
    for worker in workers.values():
        assert worker["parent"] == core
        assert worker["states"][V1_HOOK] == "applied"
        assert set(worker["states"].values()) <= {"applied", "armed"}


@pytest.mark.engine
def test_workers_draft_as_the_yaml_file_says_when_serving_with_tensor_parallelism(
    server: ModelServer,
) -> None:
    assert "layerskip is on: layers [0, 4) of 8 draft 5 tokens a step" in server.log
    counters = server.counters()
    assert counters.num_draft_tokens > counters.num_accepted_tokens > 0


IMPORTS = """
import json, sys
before = set(sys.modules)
import layerskip_vllm, layerskip_vllm.plugin, layerskip_vllm.tools.commands
seen = {"package": sorted({name.split(".")[0] for name in set(sys.modules) - before})}

from layerskip_vllm.hooks.install import Hook, hook_state
from layerskip_vllm.plugin import LEDGER, register

def states():
    return {entry.name: hook_state(entry) for entry in LEDGER if isinstance(entry, Hook)}

register()
import torch
heavy = ("vllm.v1.worker.", "vllm.v1.spec_decode.", "vllm.model_executor.models.")
seen["workers"] = [
    name for name, module in sys.modules.items()
    if name.startswith(heavy) and not hasattr(module, "__path__")
]
seen["cuda"] = torch.cuda.is_initialized()
seen["registered"] = states()
register()
seen["again"] = states()

from vllm.engine.arg_utils import EngineArgs
seen["arguments"] = states()
register()
def num_wrappers(function):
    function = getattr(function, "__func__", function)
    return 1 + num_wrappers(function.__wrapped__) if hasattr(function, "__wrapped__") else 0
seen["wrappers"] = [
    num_wrappers(vars(EngineArgs)[name])
    for name in ("create_speculative_config", "add_cli_args", "from_cli_args")
]
print("seen:" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def imports() -> dict[str, Any]:
    """What is imported, and how far the hooks are, in a new process that registers the plugin."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("seen:"))
    return json.loads(line.removeprefix("seen:"))


def test_package_imports_neither_vllm_nor_torch_when_imported(imports: dict[str, Any]) -> None:
    assert "layerskip_vllm" in imports["package"]
    assert {"vllm", "torch", "transformers", "triton", "numpy"}.isdisjoint(imports["package"])


def test_registration_imports_no_worker_and_touches_no_gpu_when_called(
    imports: dict[str, Any],
) -> None:
    assert imports["workers"] == []
    assert imports["cuda"] is False
    assert set(imports["registered"].values()) == {"armed"}


def test_registration_changes_nothing_when_repeated(imports: dict[str, Any]) -> None:
    assert imports["again"] == imports["registered"]
    assert imports["wrappers"] == [1, 1, 1]


def test_hooks_on_the_arguments_alone_are_applied_when_only_they_are_imported(
    imports: dict[str, Any],
) -> None:
    states = imports["arguments"]
    assert {target for target, state in states.items() if state == "applied"} >= ARGS_HOOKS
    assert states[V1_HOOK] == "armed"
