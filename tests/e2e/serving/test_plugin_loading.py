"""That the plugin is in every process of a real server, and nothing of its tools and training."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerskip_vllm.hooks.method_hooks import METHOD_HOOKS
from tests.e2e.serving.server import ModelServer

ARGS_HOOKS = {hook.target for hook in METHOD_HOOKS if ":EngineArgs." in hook.target}
V1_HOOK = "vllm.v1.spec_decode.draft_model:DraftModelProposer.__new__"

# A general plugin of the test's own: keeps writing down how far the hooks are in its process.
PROBE = """
import json, multiprocessing, os, sys, threading, time
from pathlib import Path

def register():
    threading.Thread(target=report, daemon=True).start()

def report():
    import vllm
    from layerskip_vllm.hooks.install import Hook, find_needed, hook_state
    from layerskip_vllm.hooks.vllm_source import read_digests
    from layerskip_vllm.plugin import LEDGER
    needed = find_needed(LEDGER, read_digests(vllm.__version__))
    hooks = [entry for entry in needed if isinstance(entry, Hook)]
    file = Path(os.environ["VLLM_TEST_PROBE"]) / f"{os.getpid()}.json"
    while True:
        states = {hook.target: hook_state(hook) for hook in hooks}
        name = multiprocessing.current_process().name
        temporary = file.with_suffix(".part")
        modules = [module for module in list(sys.modules) if module.startswith("layerskip_vllm.")]
        found = {"name": name, "parent": os.getppid(), "states": states, "modules": modules}
        temporary.write_text(json.dumps(found))
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


def wait_until_rewritten(folder: Path) -> None:
    """Wait until the probes of all living processes have begun to write anew, and have done so."""
    for _ in range(2):
        now = time.time()
        while any(
            file.stat().st_mtime < now and Path("/proc", file.stem).exists()
            for file in folder.glob("*.json")
        ):
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server(
    checkpoint: Callable[..., Path], probe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelServer]:
    """A server with two tensor-parallel workers, configured by a YAML file."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "config.yaml").write_text(YAML)
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(probe), os.environ.get("PYTHONPATH")))),
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
        wait_until_rewritten(folder)
        yield server


@pytest.fixture(scope="module")
def processes(server: ModelServer) -> dict[int, dict[str, Any]]:
    """What the probes have written, by process."""
    return {int(file.stem): json.loads(file.read_text()) for file in server.folder.glob("*.json")}


def find(processes: dict[int, dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    return {pid: process for pid, process in processes.items() if name in process["name"]}


def test_plugin_is_loaded_in_the_api_server_when_serving(
    server: ModelServer, processes: dict[int, dict[str, Any]]
) -> None:
    states = processes[server.pid]["states"]
    assert {states[target] for target in ARGS_HOOKS} == {"applied"}
    assert set(states.values()) <= {"applied", "armed"}


def test_plugin_is_loaded_in_the_engine_core_when_serving(
    server: ModelServer, processes: dict[int, dict[str, Any]]
) -> None:
    (core,) = find(processes, "EngineCore").values()
    assert core["parent"] == server.pid
    assert set(core["states"].values()) <= {"applied", "armed"}


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


def test_workers_draft_as_the_yaml_file_says_when_serving_with_tensor_parallelism(
    server: ModelServer,
) -> None:
    assert "layerskip is on: layers [0, 4) of 8 draft 5 tokens a step" in server.log
    counters = server.counters()
    assert counters.num_draft_tokens > counters.num_accepted_tokens > 0


def test_no_process_loads_a_command_or_anything_of_training_when_serving(
    processes: dict[int, dict[str, Any]],
) -> None:
    assert len(processes) >= 4
    loaded = {module for process in processes.values() for module in process["modules"]}
    assert "layerskip_vllm.drafting.proposer" in loaded
    assert not {m for m in loaded if m.split(".")[1] in ("tools", "training")}
