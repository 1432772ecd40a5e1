"""When vLLM's platform is the one on which Ray runs without GPUs."""

from __future__ import annotations

import pytest
import vllm.platforms
from vllm_ray_on_cpu.on_cpu import RAY_ON_CPU, find_platform

from tests.support.engine_process import RunnerProcess


@pytest.mark.parametrize("value", [None, "0", ""])
def test_platform_is_vllms_own_when_not_asked_otherwise(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(RAY_ON_CPU, raising=False)
    if value is not None:
        monkeypatch.setenv(RAY_ON_CPU, value)
    assert find_platform() is None


def test_platform_is_vllms_own_when_vllm_is_built_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAY_ON_CPU, "1")
    monkeypatch.setattr(vllm.platforms, "cpu_platform_plugin", lambda: None)
    assert find_platform() is None


def test_platform_takes_ray_workers_when_asked_to_on_the_cpu(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """In a process of its own, through vLLM's entry points: vLLM looks for its platform once."""
    process = RunnerProcess("v1", tmp_path_factory.mktemp("platform"), {RAY_ON_CPU: "1"})
    try:
        name, device_key = process.run("tests.support.distributed_job:find_current_platform")
    finally:
        process.stop()
    assert (name, device_key) == ("RayCpuPlatform", "GPU")
