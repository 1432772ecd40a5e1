"""A child process that runs engines: an engine's memory is free for sure at its process's end.

`verify`, the benchmarks and the tests name functions for it to call. `EngineProcess` is the
parent's side; run as a module, this file is the child's. A waiting child sleeps on its socket.
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
from typing import Any, Self

_MAX_LOG_CHARACTERS = 6000


class JobError(RuntimeError):
    """A job failed in the child; the message holds the child's traceback, or its log's end."""


class EngineProcess:
    """Runs jobs one after the other in a child, which is started again after a crash or a hang.

    What a job leaves in its module's globals, such as an engine, is there for the next one.
    """

    def __init__(
        self,
        name: str,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Prepare the process; it starts with its first job.

        `log_path` is overwritten whenever it starts; `cwd` is what it imports from, too. Where
        `env`, its whole environment, or `cwd` is None, it is this process's; without `timeout_s` a
        job may take as long as it likes.
        """
        self.name = name
        self.log_path = log_path
        self._env = env
        self._cwd = cwd
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._queue = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"engine-{name}")
        self._lock = threading.Lock()

    @property
    def log(self) -> str:
        """What it has written since it was last started."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def submit(self, job: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a job: the function `module:name`, called in the child with `args`."""
        return self._queue.submit(self._run, job, args, kwargs)

    def run(self, job: str, *args: Any, **kwargs: Any) -> Any:
        """Run a job and wait for what it returns; a `JobError` says why it did not."""
        return self.submit(job, *args, **kwargs).result()

    def __enter__(self) -> Self:
        """Return itself; the child starts with its first job."""
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """Let the child end by itself, so that what it started ends with it; not after an error."""
        self.stop(grace_s=30 if error is None else 0)

    def stop(self, grace_s: float = 0) -> None:
        """End the child after `grace_s` for its job and its own end; drop the jobs that wait."""
        self._queue.shutdown(wait=False, cancel_futures=True)
        self._end(None, grace_s)

    def _run(self, job: str, args: Any, kwargs: Any) -> Any:
        connection = self._start()
        try:
            connection.send((job, args, kwargs))
            if not connection.poll(self._timeout_s):
                self._end(signal.SIGABRT, 20)  # its fault handler writes where it hangs
                raise JobError(
                    f"{job} took longer than {self._timeout_s} s on {self.name}{self._log_end()}"
                )
            is_ok, result = connection.recv()
        except (EOFError, OSError) as error:
            self._end(signal.SIGKILL, 20)
            raise JobError(f"{job} crashed the process of {self.name}{self._log_end()}") from error
        if not is_ok:
            raise JobError(f"{job} failed on {self.name}:\n{result}")
        return result

    def _start(self) -> Connection:
        with self._lock:
            if self._connection is not None:
                return self._connection
            ours, theirs = socket.socketpair()
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno())],
                    cwd=self._cwd,
                    env=self._env,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            theirs.close()
            self._connection = Connection(ours.detach())
            return self._connection

    def _end(self, signal_number: int | None, grace_s: float) -> None:
        """Signal the child, or say that no job follows; kill it if it is there `grace_s` later."""
        with self._lock:
            process, self._process = self._process, None
            connection, self._connection = self._connection, None
        if process is None or connection is None:
            return
        if signal_number is None:
            # Not a `close`, of which neither a thread that waits on it nor the child would hear.
            with socket.socket(fileno=os.dup(connection.fileno())) as ours:
                ours.shutdown(socket.SHUT_WR)
        else:
            process.send_signal(signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)
        process.kill()
        process.wait()
        connection.close()

    def _log_end(self) -> str:
        return f"; the end of its log:\n{self.log[-_MAX_LOG_CHARACTERS:]}"


def serve_jobs() -> None:
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
            traceback.print_exc()
            connection.send((False, traceback.format_exc()))


if __name__ == "__main__":
    serve_jobs()
