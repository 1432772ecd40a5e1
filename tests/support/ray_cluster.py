"""A Ray cluster of two nodes on this machine: its processes, and that nothing of them is left.

`RayCluster` is the parent's side; run as a module, this file starts the cluster and waits until its
standard input is closed. Each node has a raylet, an address and logical GPUs of its own; what they
share is the machine's kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.support.engine_process import REPOSITORY

# Of all processes that the cluster and its users start, for `list_processes`.
MARK = "LAYERSKIP_TEST_CLUSTER"

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "token",
    # Ray would take another address than 127.0.0.1, one that other machines can reach.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}


class RayCluster:
    """Two nodes from `__enter__` to `__exit__`; the first has one logical GPU, the other two.

    Attributes:
        environment: The environment of a process that uses the cluster.
    """

    environment: dict[str, str]

    def __enter__(self) -> RayCluster:
        # Short: Ray's sockets lie in it, and their paths have at most 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "RAY_"))}
        self.environment = {
            **inherited,
            **_ENVIRONMENT,
            MARK: self._folder.name,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(self._folder),
            "VLLM_CACHE_ROOT": str(self._folder / "cache"),
        }
        self._shared_memory: set[Path] = set()
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch_shared_memory, daemon=True)
        self._watcher.start()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_cluster"],
            cwd=REPOSITORY,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(b"cluster:"):
                self.environment["RAY_ADDRESS"] = json.loads(line.removeprefix(b"cluster:"))
                return self
        self.end()
        raise AssertionError("the Ray cluster did not start")

    def __exit__(self, *_: object) -> None:
        left = self.end()
        assert not left, f"processes of Ray were left: {left}"

    def end(self) -> list[str]:
        """Stop all nodes, and remove what vLLM leaves in `/dev/shm` when Ray kills its workers.

        Returns:
            The command lines of processes that did not end by themselves, and were killed.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=60)
        end = time.monotonic() + 20
        while self.list_processes() and time.monotonic() < end:
            time.sleep(0.5)
        left = self.list_processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._is_over.set()
        self._watcher.join()
        for path in self._shared_memory:
            path.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        return list(left.values())

    def list_processes(self) -> dict[int, str]:
        """Command lines of all processes that the cluster and its users have started, by pid."""
        found = {}
        mark = f"{MARK}={self._folder.name}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode(errors="replace")
        return found

    def _watch_shared_memory(self) -> None:
        """Note down every file in `/dev/shm` that the cluster's processes have mapped."""
        while not self._is_over.wait(2):
            for pid in self.list_processes():
                with contextlib.suppress(OSError):
                    maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
                    self._shared_memory |= {
                        Path(line.split(maxsplit=5)[5])
                        for line in maps.splitlines()
                        if "/dev/shm/" in line and not line.endswith("(deleted)")
                    }


def main() -> None:
    """Start the cluster, say where it is, and stop it when standard input ends."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100 * 1024 * 1024, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 8, "num_gpus": 1, "node_ip_address": "127.0.0.1", **memory},
    )
    cluster.add_node(num_cpus=8, num_gpus=2, node_ip_address="127.0.0.2", **memory)
    cluster.wait_for_nodes()
    print(f"cluster:{json.dumps(cluster.address)}", flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
