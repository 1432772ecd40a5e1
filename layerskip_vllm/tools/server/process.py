"""One `vllm serve` for the time of a `with`, for benchmarks and tests; no process stays behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

HOST = "127.0.0.1"
_NUM_PORT_ATTEMPTS = 3
_POLL_INTERVAL_S = 0.2
_STOP_GRACE_S = 15
_NUM_LOG_TAIL_LINES = 30


class ServerError(RuntimeError):
    """A server did not start, or is gone."""


def find_free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """A server on a port of its own; use it in a `with` block, which waits until it is up."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_path: Path,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 1800,
    ) -> None:
        """Prepare a server; nothing is started yet.

        `command` is without `--host` and `--port`, which are added. `log_path` is overwritten,
        `env` the whole environment, this process's when None; `GET /health` has to succeed in
        `start_timeout_s`.
        """
        self.name = name
        self.port = 0  # until it is started
        self.log_path = log_path
        self._command = list(command)
        self._env = env
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The process that was started, which is the API server's."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What all of its processes have written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def __enter__(self) -> Self:
        """Start the server and wait until it answers; a ServerError has the end of its log."""
        try:
            self.start()
            self.wait_until_up()
            return self
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        """End the server and all of its processes."""
        self.stop()

    def start(self) -> None:
        """Start the server without waiting for it; whoever calls this calls `stop` in the end."""
        self.stop()
        self.port = find_free_port()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            # A session of its own: Ctrl-C reaches this process only, which then ends the group in
            # order.
            self._process = subprocess.Popen(
                [*self._command, f"--host={HOST}", f"--port={self.port}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )

    def wait_until_up(self) -> None:
        """Wait until the started server answers; start it again if its port was taken meanwhile.

        A ServerError says that it has ended or is not up in time, with the end of its log.
        """
        num_attempts = 1
        while not self._is_up():
            if "ddress already in use" not in self.log or num_attempts == _NUM_PORT_ATTEMPTS:
                raise ServerError(self._describe_failure("ended before it was up"))
            self.start()
            num_attempts += 1

    def check_alive(self) -> None:
        """Raise a ServerError with the end of its log if the server has ended."""
        if self._process is None or self._process.poll() is not None:
            raise ServerError(self._describe_failure("has ended"))

    def fetch(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> str:
        """GET a path such as `/metrics`, or POST a body to it as JSON; return the answer's body.

        Raise a ServerError if the server is gone, a `urllib.error.HTTPError` if it refuses.
        """
        self.check_alive()
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )
        # No proxy of the environment's for this machine itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout_s) as response:
            text: bytes = response.read()
            return text.decode()

    def wait(self, timeout_s: float) -> None:
        """Wait for it to end by itself; its exit status is vLLM's affair, 0 after a dead engine."""
        assert self._process is not None
        self._process.wait(timeout_s)

    def stop(self) -> None:
        """End the server: first it alone, so that it ends its workers, then what is left of them.

        A second Ctrl-C while it waits only makes it quicker.
        """
        if self._process is None:
            return
        try:
            if self._process.poll() is None:
                self._process.terminate()
            deadline_s = time.monotonic() + _STOP_GRACE_S
            while self._is_group_alive() and time.monotonic() < deadline_s:
                time.sleep(_POLL_INTERVAL_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _is_up(self) -> bool:
        """Return True once the server answers, False if it ends before."""
        assert self._process is not None
        deadline_s = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                return False
            with contextlib.suppress(OSError, http.client.HTTPException, ServerError):
                self.fetch("/health", timeout_s=5)
                return True
            time.sleep(_POLL_INTERVAL_S)
        raise ServerError(self._describe_failure(f"was not up in {self._start_timeout_s:.0f} s"))

    def _is_group_alive(self) -> bool:
        assert self._process is not None
        self._process.poll()  # reaps the leader, which would count as alive otherwise
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _describe_failure(self, what: str) -> str:
        tail = "\n".join(self.log.splitlines()[-_NUM_LOG_TAIL_LINES:])
        if self._process is not None and self._process.returncode is not None:
            what += f" (exit status {self._process.returncode})"
        return (
            f"the {self.name} server {what}.\nCommand: {' '.join(self._command)}\n"
            f"End of {self.log_path}:\n{tail}"
        )
