"""A `vllm serve` of its own for tests: its processes, its log and its HTTP interface."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

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
}
FLAGS = [
    "--host=127.0.0.1",
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
    return [str(Path(sys.executable).with_name("vllm")), "serve", *arguments]


class Server:
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
        self.arguments = [*arguments, *flags]
        self.variables = {"VLLM_CACHE_ROOT": str(folder / "cache"), **(variables or {})}
        self.port = find_free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command(*self.arguments, f"--port={self.port}"),
                env=environment(**self.variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(timeout_s=400)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        """The API server's process."""
        assert self._process is not None
        return self._process.pid

    def wait(self, timeout_s: float) -> None:
        """Wait for it to end by itself; its exit status is vLLM's affair, 0 after a dead engine."""
        assert self._process is not None
        self._process.wait(timeout_s)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What the processes have written so far."""
        return (self.folder / "log").read_text(errors="replace")

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

    def counters(self, rank: int = 0) -> dict[str, float]:
        """GET `/metrics`: vLLM's `spec_decode` counters by name, and by position after it."""
        lines = self.fetch("/metrics").splitlines()
        found = {}
        for line in lines:
            match = re.match(r"vllm:spec_decode_(\w+)_total\{(.*)\} (\S+)$", line)
            if match and f'engine="{rank}"' in match[2]:
                position = re.search(r'position="(\d+)"', match[2])
                found[match[1] + (f"[{position[1]}]" if position else "")] = float(match[3])
        return found

    def fetch(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> str:
        """GET a path, or POST JSON to it: the response's text."""
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )
        # No proxy of the environment's for this machine itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as response:
            return response.read().decode()

    def _wait_until_ready(self, timeout_s: float) -> None:
        assert self._process is not None
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self.fetch("/health")
                return
            time.sleep(0.5)
        status = self._process.poll()
        raise AssertionError(
            f"the server did not come up (exit status {status}); its log ends:\n{self.log[-6000:]}"
        )

    def _end(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def find_free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
