"""A child process that runs engines for tests: one for each of vLLM's model runners.

Importing vLLM takes longer than any job, and which runner and kernels a process uses is fixed when
vLLM is imported. `EngineProcess` is the parent's side; run as a module, this file is the child's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Of one job; for machines that are busy with other things.
TIMEOUT_S = float(os.environ.get("ENGINE_JOB_TIMEOUT_S", "600"))

REPOSITORY = Path(__file__).parents[2]
TRITON_INTERPRETER = Path(__file__).parent / "triton_interpreter"

RUNNERS: Mapping[str, Mapping[str, str]] = {
    # vLLM's default on the CPU.
    "v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    # vLLM's default on the GPU.
    "v2": {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(TRITON_INTERPRETER),
    },
}

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class JobError(AssertionError):
    """A job failed in the child; the message holds the child's traceback."""


class EngineProcess:
    """Runs jobs one after the other in a child, which is started again after a crash or a hang."""

    def __init__(self, runner: str, folder: Path, environment: Mapping[str, str] | None = None):
        """Prepare the process; it starts with its first job.

        Args:
            runner: A key of `RUNNERS`.
            folder: Where vLLM keeps its caches and the child its log.
            environment: More environment variables.
        """
        self.runner = runner
        self._folder = folder
        self._environment = {**RUNNERS[runner], **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._queue = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"engine-{runner}")
        self._lock = threading.Lock()

    def submit(
        self, job: str, *args: Any, timeout_s: float = TIMEOUT_S, **kwargs: Any
    ) -> Future[Any]:
        """Queue a job: the function `module:name`, called in the child with `args`."""
        return self._queue.submit(self._run, job, args, kwargs, timeout_s)

    def run(self, job: str, *args: Any, timeout_s: float = TIMEOUT_S, **kwargs: Any) -> Any:
        """Run a job and wait for what it returns.

        Raises:
            JobError: If it raises, crashes the child or takes longer than `timeout_s`.
        """
        return self.submit(job, *args, timeout_s=timeout_s, **kwargs).result()

    def stop(self) -> None:
        """End the child and drop the jobs that wait."""
        self._queue.shutdown(wait=False, cancel_futures=True)
        self._kill()

    def _run(self, job: str, args: Any, kwargs: Any, timeout_s: float) -> Any:
        connection = self._start()
        try:
            connection.send((job, args, kwargs))
            if not connection.poll(timeout_s):
                self._kill(signal.SIGABRT)  # its fault handler writes where it hangs
                raise JobError(
                    f"{job} took longer than {timeout_s} s on {self.runner}{self._log()}"
                )
            is_ok, result = connection.recv()
        except (EOFError, OSError) as error:
            self._kill()
            raise JobError(f"{job} crashed the process of {self.runner}{self._log()}") from error
        if not is_ok:
            raise JobError(f"{job} failed on {self.runner}:\n{result}")
        return result

    def _start(self) -> Connection:
        with self._lock:
            if self._connection is not None:
                return self._connection
            ours, theirs = socket.socketpair()
            inherited = {
                key: value for key, value in os.environ.items() if not key.startswith("VLLM_")
            }
            environment = {
                **inherited,
                **_ENVIRONMENT,
                "VLLM_CACHE_ROOT": str(self._folder / "cache"),
                **self._environment,
            }
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.support.engine_process", str(theirs.fileno())],
                    cwd=REPOSITORY,
                    env=environment,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            theirs.close()
            self._connection = Connection(ours.detach())
            return self._connection

    def _kill(self, signal_number: int = signal.SIGKILL) -> None:
        with self._lock:
            process, self._process = self._process, None
            connection, self._connection = self._connection, None
        if process is not None:
            process.send_signal(signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()
            process.wait()
        if connection is not None:
            connection.close()

    def _log(self) -> str:
        text = (self._folder / "log").read_text(errors="replace")
        return f"; the end of its log:\n{text[-6000:]}"


def main() -> None:
    """Serve jobs from the socket named on the command line until it closes."""
    import faulthandler

    faulthandler.enable()
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            job, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            module, _, name = job.partition(":")
            result = getattr(importlib.import_module(module), name)(*args, **kwargs)
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))


if __name__ == "__main__":
    main()
