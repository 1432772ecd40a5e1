"""The two command lines that a benchmark compares: `vllm serve`, plain and with layerskip."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PLAIN, LAYERSKIP = "plain", "layerskip"
SERVED_MODEL_NAME = "benchmark"
_MAX_MODEL_LEN = 1024
_KV_CACHE_BYTES = 256 * 2**20
_MEMORY_SHARE = "0.45"  # two servers are up at the same time


def build_commands(
    model: str,
    dtype: str,
    exit_layer: int | None = None,
    num_speculative_tokens: int | None = None,
    vllm_args: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Build the servers' commands, which differ in the speculative flags alone.

    Args:
        model: The model's path or Hugging Face name.
        dtype: vLLM's `--dtype`.
        exit_layer: The layer after which drafts leave the model; the checkpoint's own when None.
        num_speculative_tokens: Tokens in a draft; the checkpoint's own when None.
        vllm_args: More arguments for both; one that is here already is overridden.

    Returns:
        The commands by the server's name, without host and port.
    """
    plain = ["vllm", "serve", model, "--dtype", dtype]
    plain += ["--max-model-len", str(_MAX_MODEL_LEN)]
    plain += ["--kv-cache-memory-bytes", str(_KV_CACHE_BYTES)]
    plain += ["--gpu-memory-utilization", _MEMORY_SHARE]
    plain += ["--served-model-name", SERVED_MODEL_NAME, "--disable-uvicorn-access-log", *vllm_args]
    layerskip = [*plain, "--speculative-model=layerskip"]
    if num_speculative_tokens is not None:
        layerskip.append(f"--num-speculative-tokens={num_speculative_tokens}")
    if exit_layer is not None:
        layerskip.append(f"--spec-exit-layer={exit_layer}")
    return {PLAIN: plain, LAYERSKIP: layerskip}


def resolve_vllm(command: Sequence[str]) -> list[str]:
    """Have the running Python run a command that begins with `vllm`, script or no script.

    Args:
        command: The command.

    Returns:
        The same for this Python.
    """
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:]]


def build_env(name: str, model: str, is_gpu: bool) -> dict[str, str]:
    """Build the environment of a server.

    Args:
        name: `PLAIN` or `LAYERSKIP`; the plain one runs without any plugin.
        model: The model's path or Hugging Face name; a path needs no network.
        is_gpu: Whether it runs on a GPU; on a CPU, as vLLM advises for servers, Intel's OpenMP is
            loaded, and a core is left to all that is not the model.

    Returns:
        The whole environment.
    """
    env = dict(os.environ) | {"VLLM_NO_USAGE_STATS": "1"}
    if Path(model).exists():
        env["HF_HUB_OFFLINE"] = "1"
    if name == PLAIN:
        env["VLLM_PLUGINS"] = ""
    if is_gpu:
        return env
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        env.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
    if len(cores) == 2:
        # vLLM binds a model to the cores left, and what compiles it with it: here to the same core
        # in both servers, which start at the same time.
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[name == LAYERSKIP]))
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.exists():
        env["LD_PRELOAD"] = _join_preloads(openmp, env)
    return env


def _join_preloads(library: Path, env: Mapping[str, str]) -> str:
    return ":".join(filter(None, (env.get("LD_PRELOAD"), str(library))))
