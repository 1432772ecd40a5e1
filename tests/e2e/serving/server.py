"""A `vllm serve` of its own for tests, with flags and an environment that a busy CPU can bear."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving.vllm_command import resolve_vllm
from layerskip_vllm.tools.float32 import IEEE_FLOAT32
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters
from layerskip_vllm.tools.server.process import Server

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Inductor would compile small functions of vLLM's for ten seconds and more, eager or not.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    **IEEE_FLOAT32,
}
FLAGS = [
    "--served-model-name=model",
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=256",
    "--max-num-seqs=4",
    "--block-size=32",
    "--kv-cache-memory-bytes=16777216",
]


def environment(**more: str) -> dict[str, str]:
    """The environment of a server: this one's without vLLM's settings."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    return {**inherited, **ENVIRONMENT, **more}


def command(*arguments: str) -> list[str]:
    """The command line of `vllm serve`."""
    return resolve_vllm(["vllm", "serve", *arguments])


class ModelServer(Server):
    """Serves a model from `__enter__` to `__exit__`, which ends all of its processes."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
        flags: Sequence[str] = FLAGS,
    ) -> None:
        """Prepare the server.

        Args:
            folder: Where its log and its caches go.
            arguments: The model and flags for `vllm serve`.
            variables: More environment variables.
            flags: The flags that it has besides.
        """
        self.folder = folder
        env = environment(**{"VLLM_CACHE_ROOT": str(folder / "cache"), **(variables or {})})
        super().__init__("tested", command(*arguments, *flags), folder / "log", env, 400)

    def complete(
        self, prompt: str | Sequence[int], rank: int | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """POST to `/v1/completions`, to one of several data-parallel ranks: the response."""
        body = {"model": "model", "prompt": prompt, "temperature": 0, **parameters}
        headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
        return json.loads(self.fetch("/v1/completions", body, headers))

    def call_workers(self, method: str) -> list[Any]:
        """Call a method of all workers; with `VLLM_SERVER_DEV_MODE=1`.

        Returns:
            What those of the first data-parallel rank returned.
        """
        text = self.fetch("/collective_rpc", {"method": method})
        return json.loads(text)["results"] if text else []

    def counters(self, rank: int = 0) -> SpecDecodeCounters:
        """GET `/metrics`: what one data-parallel rank has drafted and accepted."""
        metrics = text_string_to_metric_families(self.fetch("/metrics"))
        return SpecDecodeCounters.read(metrics, engine=rank)
