"""Names the machine that something was found on: for `doctor` and for every measurement."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

_CPUINFO_PATH = Path("/proc/cpuinfo")


def describe_hardware() -> str:
    """Return the accelerators if there are any, and the processor with its usable cores."""
    return ", ".join([*list_gpu_names(), describe_cpu()])


def describe_cpu() -> str:
    """Return the processor's name and the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    num_cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"{_read_cpu_model()}, {'1 core' if num_cores == 1 else f'{num_cores} cores'}"


def list_gpu_names() -> list[str]:
    """Return the names of the NVIDIA GPUs that `nvidia-smi` lists; none where it is not there."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return []
    query = [nvidia_smi, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def _read_cpu_model() -> str:
    lines = _CPUINFO_PATH.read_text().splitlines() if _CPUINFO_PATH.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
