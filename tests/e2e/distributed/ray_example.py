"""Runs a file of `examples/` on the tests' cluster, with an engine that both can afford."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.e2e.distributed.conftest import DRIVERS_OWN
from tests.support.engine_process import REPOSITORY
from tests.support.ray_cluster import RayCluster
from tests.support.scenarios import layerskip

EXIT_LAYER, K = 4, 3
IS_ON = f"layerskip is on: layers [0, {EXIT_LAYER}) of 8 draft {K} tokens a step"
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 24,
    "enforce_eager": True,
    "speculative_config": layerskip(EXIT_LAYER, K),
}


def engine_flag(**arguments: Any) -> str:
    """The flag `--engine` of an example, with `ENGINE` and more arguments."""
    return f"--engine={json.dumps({**ENGINE, **arguments})}"


class Example:
    """An example that runs, from `__enter__` to `__exit__`."""

    def __init__(self, cluster: RayCluster, folder: Path, name: str, model: Path, *flags: str):
        """Prepare it.

        Args:
            cluster: Where it runs.
            folder: Where its output goes, with that of its actors.
            name: The file in `examples/`.
            model: The checkpoint.
            flags: More of its flags.
        """
        self.file = folder / f"{name}.log"
        self._command = [sys.executable, f"examples/{name}.py", f"--model={model}", *flags]
        # So that vLLM logs what was drafted however short it runs.
        self._environment = {**cluster.environment, **DRIVERS_OWN, "VLLM_LOG_STATS_INTERVAL": "0.1"}

    def __enter__(self) -> Example:
        with self.file.open("wb") as file:
            self.process = subprocess.Popen(
                self._command,
                cwd=REPOSITORY,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # A process that was started in the background ignores it, and so do its children.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=120)
        finally:
            self.process.kill()
            self.process.wait()
        assert self.process.returncode == 0, self.output[-6000:]

    @property
    def output(self) -> str:
        """What it and its actors have written so far."""
        return self.file.read_text(errors="replace")

    def wait(self, line: str | None = None, timeout_s: float = 400) -> str:
        """Wait until it has written a line, or has ended: its output."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            is_over = self.process.poll() is not None
            if is_over or (line is not None and line in self.output.splitlines()):
                return self.output
            time.sleep(0.5)
        raise AssertionError(f"{self.file.name} takes too long; it ends:\n{self.output[-6000:]}")
