"""Child processes that run engines for tests: one for each of vLLM's model runners.

Importing vLLM takes longer than any job, and which runner and kernels a process uses is fixed when
vLLM is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from layerskip_vllm.tools.engine_process import EngineProcess
from layerskip_vllm.tools.float32 import IEEE_FLOAT32

# Of one job; for machines that are busy with other things.
TIMEOUT_S = float(os.environ.get("ENGINE_JOB_TIMEOUT_S", "600"))

REPOSITORY = Path(__file__).parents[2]
TRITON_INTERPRETER = Path(__file__).parent / "triton_interpreter"

IS_ON_GPU = torch.cuda.is_available()
# Before the tests' own, which may have another vLLM (`scripts/vllm_python.py`).
_PATHS = (str(TRITON_INTERPRETER), os.environ.get("PYTHONPATH"))
_INTERPRETER = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, _PATHS))}

RUNNERS: Mapping[str, Mapping[str, str]] = {
    # vLLM's default on the CPU.
    "v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    # vLLM's default on the GPU, with its kernels there; elsewhere under Triton's interpreter.
    "v2": {"VLLM_USE_V2_MODEL_RUNNER": "1", **({} if IS_ON_GPU else _INTERPRETER)},
}
# A GPU's time goes to its own: V1 is seen there where a test asks for it by name.
TESTED_RUNNERS = ("v2",) if IS_ON_GPU else ("v1", "v2")

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # where it is installed, it may want to download kernels
    **IEEE_FLOAT32,
}


class RunnerProcess(EngineProcess):
    """A process for one of the model runners, without the tests' own settings of vLLM."""

    def __init__(self, runner: str, folder: Path, environment: Mapping[str, str] | None = None):
        """Prepare the process; it starts with its first job.

        Args:
            runner: A key of `RUNNERS`.
            folder: Where vLLM keeps its caches and the child its log.
            environment: More environment variables.
        """
        self.runner = runner
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
        env = {
            **inherited,
            **_ENVIRONMENT,
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            **RUNNERS[runner],
            **(environment or {}),
        }
        super().__init__(runner, folder / "log", env, REPOSITORY, TIMEOUT_S)
