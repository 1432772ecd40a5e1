"""The Ray cluster that all tests of Ray share, and processes that run vLLM on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from tests.support.engine_process import RUNNERS, RunnerProcess
from tests.support.ray_cluster import RayCluster

# Neither of the cluster's nodes was started with these.
DRIVERS_OWN = {"VLLM_LAYERSKIP_RAY_ON_CPU": "1", "VLLM_LAYERSKIP_SKIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """Two nodes; afterwards, that none of their processes is left."""
    with RayCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def drivers(
    cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, RunnerProcess]]:
    """For each model runner a process that runs engines, on the cluster where they ask for Ray."""
    processes = {}
    for runner, variables in RUNNERS.items():
        paths = [variables.get("PYTHONPATH"), cluster.environment["PYTHONPATH"]]
        variables = {**variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment = {
            **cluster.environment,
            **variables,
            **DRIVERS_OWN,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            # The runner is chosen, and Triton replaced, before an actor imports anything.
            "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # where vLLM's engine core gives it once more
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": variables}}),
        }
        processes[runner] = RunnerProcess(
            runner, tmp_path_factory.mktemp(f"driver-{runner}"), environment
        )
    yield processes
    for process in processes.values():
        process.stop()


@pytest.fixture(scope="session")
def driver(drivers: dict[str, RunnerProcess]) -> RunnerProcess:
    """That of vLLM's default model runner on the CPU."""
    return drivers["v1"]
