"""Names the machine that a measurement was made on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

_CPUINFO_PATH = Path("/proc/cpuinfo")


def describe_hardware() -> str:
    """Returns the accelerators if there are any, and the processor with its usable cores."""
    num_cores = len(os.sched_getaffinity(0))
    cores = "1 core" if num_cores == 1 else f"{num_cores} cores"
    return ", ".join([*list_gpu_names(), f"{_read_cpu_model()}, {cores}"])


def list_gpu_names() -> list[str]:
    """Returns the names of the NVIDIA GPUs that `nvidia-smi` lists; none where it is not there."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return []
    query = [nvidia_smi, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def _read_cpu_model() -> str:
    if _CPUINFO_PATH.exists():
        for line in _CPUINFO_PATH.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
