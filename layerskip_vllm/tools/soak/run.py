"""Keeps a server under traffic for a time, then checks what it has left behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp

from layerskip_vllm.tools.server.service import Service, open_session
from layerskip_vllm.tools.soak.checks import Check, check_all
from layerskip_vllm.tools.soak.client import End, Tally, send
from layerskip_vllm.tools.soak.command import SoakConfig
from layerskip_vllm.tools.soak.monitor import Look, Monitor
from layerskip_vllm.tools.soak.questions import Question
from layerskip_vllm.tools.soak.traffic import Request, Traffic

_IDLE_TIMEOUT_S = 60.0
# After a fault: a server that is gone would refuse thousands of requests a second.
_PAUSE_S = 1.0


@dataclass
class Soak:
    """A run, and what it found."""

    config: SoakConfig
    service: Service
    tally: Tally = field(default_factory=Tally)
    looks: list[Look] = field(default_factory=list)  # first before, last after all traffic
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0  # how long requests were sent
    is_interrupted: bool = False  # by the user

    @property
    def is_passed(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.is_passed for check in self.checks)


async def run_soak(
    config: SoakConfig,
    service: Service,
    questions: Sequence[Question],
    on_progress: Callable[[Soak], None],
) -> Soak:
    """Send traffic, wait for the server to be idle, and check; `on_progress` follows each request.

    A ValueError says that the server has no metrics of speculative decoding, an OSError that there
    is no process `config.pid`, an `aiohttp.ClientError` that the server is gone before any traffic.
    """
    soak = Soak(config, service)
    traffic = Traffic(service, questions, config.seed, config.kinds)
    async with await open_session(service.url, config.timeout_s) as session:
        monitor = Monitor(session, config.pid)
        await monitor.look()
        looking = asyncio.create_task(monitor.keep_looking(config.interval_s))
        try:
            await _send_all(session, soak, traffic, on_progress)
        finally:
            looking.cancel()
        is_idle = await _wait_until_idle(session, service, monitor)
        soak.looks = monitor.looks
        soak.checks = check_all(
            soak.tally, soak.looks, is_idle, await _is_healthy(session), config.max_growth_mib
        )
    return soak


async def _send_all(
    session: aiohttp.ClientSession,
    soak: Soak,
    traffic: Traffic,
    on_progress: Callable[[Soak], None],
) -> None:
    config, start_s = soak.config, time.monotonic()

    def is_over() -> bool:
        soak.seconds = time.monotonic() - start_s
        num_sent = soak.tally.total.num_sent
        return (
            soak.is_interrupted
            or soak.seconds >= 60 * config.minutes
            or (config.num_requests is not None and num_sent >= config.num_requests)
            or len(soak.tally.faults) >= config.max_faults
        )

    async def work(requests: Iterable[Request]) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # Ctrl-C in the pause after a fault
            for request in requests:
                if is_over():
                    return
                await _send_one(session, soak.tally, request)
                on_progress(soak)

    rounds: list[list[Iterable[Request]]] = [[iter(traffic.draw, None)] * config.concurrency]
    if not config.kinds:
        rounds.insert(0, [traffic.list_alone()])
    for round_ in rounds:
        workers = [asyncio.create_task(work(requests)) for requests in round_]
        with _on_interrupt(soak, workers):
            await asyncio.gather(*workers)
    soak.seconds = time.monotonic() - start_s


async def _send_one(session: aiohttp.ClientSession, tally: Tally, request: Request) -> None:
    tally.begin(request.kind)
    outcome = await send(session, request)
    tally.end(outcome)
    if outcome.end is End.FAULT:
        await asyncio.sleep(_PAUSE_S)


@contextlib.contextmanager
def _on_interrupt(soak: Soak, workers: Sequence[asyncio.Task[None]]) -> Iterator[None]:
    """On Ctrl-C, leaves the open requests and sends no more; a second one ends the process."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        soak.is_interrupted = True
        loop.remove_signal_handler(signal.SIGINT)
        for worker in workers:
            worker.cancel()

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _wait_until_idle(
    session: aiohttp.ClientSession, service: Service, monitor: Monitor
) -> bool:
    """Wait for the server to have neither requests nor used blocks left.

    vLLM's gauges are of its last step, so a step is made after all requests are gone.
    """
    probe = {"model": service.model, "prompt": "1", "max_tokens": 1}
    end_s = time.monotonic() + _IDLE_TIMEOUT_S
    while time.monotonic() < end_s:
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError, ValueError):
            async with session.post("v1/completions", json=probe) as response:
                await response.read()
            if (await monitor.look()).load == (0, 0, 0.0):
                return True
        await asyncio.sleep(0.5)
    return False


async def _is_healthy(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("health") as response:
            return response.status == 200
    except (TimeoutError, aiohttp.ClientError, OSError):
        return False
