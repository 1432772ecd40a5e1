"""The Ray cluster that all tests of Ray share, and a process that runs vLLM on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.engine_process import EngineProcess
from tests.support.ray_cluster import RayCluster

# Neither of the cluster's nodes was started with these.
DRIVERS_OWN = {"VLLM_LAYERSKIP_RAY_ON_CPU": "1", "VLLM_LAYERSKIP_SKIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """Two nodes; afterwards, that none of their processes is left."""
    with RayCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def driver(
    cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """A process that runs engines, on the cluster where they ask for Ray."""
    variables = {**cluster.environment, **DRIVERS_OWN, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = EngineProcess("v1", tmp_path_factory.mktemp("driver"), variables)
    yield process
    process.stop()
