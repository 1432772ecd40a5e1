"""Starts `vllm serve` as a process group of its own on a free loopback port, and ends all of it.

`demo` runs two of them; whatever happens in the `with` block, no process is left behind.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

HOST = "127.0.0.1"
_NUM_PORT_ATTEMPTS = 3
_POLL_INTERVAL_S = 0.2
_STOP_GRACE_S = 15
_NUM_LOG_TAIL_LINES = 30


class ServerError(RuntimeError):
    """A server did not start, or is gone."""


def find_free_port() -> int:
    """Returns a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process on a port of its own; use it in a `with` block, which waits until it is up.

    Attributes:
        name: What messages call it.
        port: Where it listens, known once it is up.
        log_path: Where its output goes.
    """

    name: str
    port: int
    log_path: Path

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_path: Path,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 1800,
    ) -> None:
        """Prepares a server; nothing is started yet.

        Args:
            name: What messages call it.
            command: The command without `--host` and `--port`, which are added.
            log_path: File for its output, overwritten.
            env: Its whole environment; this process's when None.
            start_timeout_s: Seconds in which `GET /health` has to succeed.
        """
        self.name = name
        self.port = 0
        self._command = list(command)
        self.log_path = log_path
        self._env = env
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """The server's address."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Server:
        """Starts the server and waits until it answers.

        Returns:
            The server itself.

        Raises:
            ServerError: If it ends or is not up in time; the message has the end of its log.
        """
        try:
            for attempt in range(_NUM_PORT_ATTEMPTS):
                self._start()
                if self._wait_until_up():
                    return self
                is_last = attempt == _NUM_PORT_ATTEMPTS - 1
                if is_last or "ddress already in use" not in self._read_log():
                    break
            raise ServerError(self._describe_failure("ended before it was up"))
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the server and all of its processes."""
        self.stop()

    def check_alive(self) -> None:
        """Does nothing while the server runs.

        Raises:
            ServerError: If it has ended; the message has the end of its log.
        """
        if self._process is None or self._process.poll() is not None:
            raise ServerError(self._describe_failure("has ended"))

    def get(self, path: str) -> str:
        """Asks the server for a page.

        Args:
            path: Path on the server, such as `/metrics`.

        Returns:
            The answer's body.

        Raises:
            ServerError: If the server is gone or the status is not 200.
        """
        self.check_alive()
        status, body = self._request(path, timeout_s=30)
        if status != 200:
            raise ServerError(f"GET {path} of the {self.name} server: status {status}.")
        return body

    def stop(self) -> None:
        """Ends the server: first it alone, so that it ends its workers, then what is left of them.

        A second Ctrl-C while it waits only makes it quicker.
        """
        if self._process is None:
            return
        group = self._process.pid
        try:
            if self._process.poll() is None:
                self._process.terminate()
            deadline_s = time.monotonic() + _STOP_GRACE_S
            while _is_group_alive(group, self._process) and time.monotonic() < deadline_s:
                time.sleep(_POLL_INTERVAL_S)
        finally:
            _kill_group(group)
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self.stop()
        self.port = find_free_port()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = _popen(
                [*self._command, "--host", HOST, "--port", str(self.port)], log, self._env
            )

    def _wait_until_up(self) -> bool:
        """Returns True once the server answers, False if it ends before."""
        assert self._process is not None
        deadline_s = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                return False
            try:
                status, _ = self._request("/health", timeout_s=5)
            except (OSError, http.client.HTTPException):
                status = 0
            if status == 200:
                return True
            time.sleep(_POLL_INTERVAL_S)
        raise ServerError(self._describe_failure(f"was not up in {self._start_timeout_s:.0f} s"))

    def _request(self, path: str, timeout_s: float) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _read_log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _describe_failure(self, what: str) -> str:
        tail = "\n".join(self._read_log().splitlines()[-_NUM_LOG_TAIL_LINES:])
        if self._process is not None and self._process.returncode is not None:
            what += f" (exit status {self._process.returncode})"
        return (
            f"the {self.name} server {what}.\nCommand: {' '.join(self._command)}\n"
            f"End of {self.log_path}:\n{tail}"
        )


def _popen(
    command: Sequence[str], log: IO[bytes], env: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches this process only, which then ends the group in order.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=None if env is None else dict(env),
        start_new_session=True,
    )


def _is_group_alive(group: int, leader: subprocess.Popen[bytes]) -> bool:
    leader.poll()  # reaps the leader, which would count as alive otherwise
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
