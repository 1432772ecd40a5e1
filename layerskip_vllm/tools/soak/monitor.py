"""A server's load and memory while it is soaked: its `/metrics`, and its processes where local."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from layerskip_vllm.tools.server.metrics import Sample, parse_sample

_MIN_SAMPLES = 12


@dataclass(frozen=True)
class Look:
    """A server at one time."""

    seconds: float  # since the first look
    sample: Sample
    memory_mib: float | None  # resident, of all its processes; None if they are not looked at

    @property
    def load(self) -> tuple[int, int, float]:
        """Requests running, requests waiting, share of the KV cache in use."""
        return self.sample.num_running, self.sample.num_waiting, self.sample.kv_cache_usage


class Monitor:
    """Look at a server now and then."""

    def __init__(self, session: aiohttp.ClientSession, pid: int | None) -> None:
        """Prepare to look at a session's server, and at its first process if that is here."""
        self._session = session
        self._pid = pid
        self._start_s = time.monotonic()
        self.looks: list[Look] = []

    async def look(self) -> Look:
        """Look once; a ValueError says that there are no metrics of speculative decoding."""
        async with self._session.get("metrics") as response:
            text = await response.text()
        now_s = time.monotonic()
        memory_mib = None if self._pid is None else read_memory_mib(self._pid)
        found = Look(now_s - self._start_s, parse_sample(text, now_s), memory_mib)
        self.looks.append(found)
        return found

    async def keep_looking(self, interval_s: float) -> None:
        """Look until cancelled; a server that is away is the requests' fault to find."""
        while True:
            await asyncio.sleep(interval_s)
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError, ValueError):
                await self.look()


def read_memory_mib(pid: int) -> float:
    """Add up the MiB that a process and its descendants hold; shared pages count more than once."""
    import psutil

    try:
        first = psutil.Process(pid)
        processes = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(f"there is no process {pid}") from error
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child that has just ended
            total += process.memory_info().rss
    return total / 2**20


def measure_growth_mib(looks: Sequence[Look]) -> float | None:
    """Measure by how much memory has grown once the server was warm; None with too few looks.

    The first half of a run is its warm-up: caches fill, and allocators keep what they were given.
    Of the second half, the median of its last third is compared with that of its first third.
    """
    memory = [look.memory_mib for look in looks if look.memory_mib is not None]
    if len(memory) < _MIN_SAMPLES:
        return None
    warm = memory[len(memory) // 2 :]
    third = len(warm) // 3
    return statistics.median(warm[-third:]) - statistics.median(warm[:third])
