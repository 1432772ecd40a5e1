"""A server's process is killed: no answer is lost without an error, and a new server is as good."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import pytest

from layerskip_vllm.tools.server.service import inspect, open_session
from layerskip_vllm.tools.soak.client import End, Outcome, send
from layerskip_vllm.tools.soak.monitor import Monitor
from layerskip_vllm.tools.soak.questions import Question
from layerskip_vllm.tools.soak.traffic import Traffic
from tests.e2e.serving.server import FLAGS, ModelServer

pytestmark = pytest.mark.timeout(1800)

# Many times what the server runs at once: some are being answered when the process dies, others
# wait, and the first may have ended.
NUM_OPEN = 32
LONG = Question(
    "long answer",
    {"prompt": "hello", "max_tokens": 480, "temperature": 0, "ignore_eos": True},
)


@pytest.fixture(scope="module")
def make_server(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], ModelServer]:
    """Servers alike, each with two tensor-parallel workers."""
    arguments = [
        str(checkpoint("llama")),
        "--speculative-model=layerskip",
        "--spec-exit-layer=4",
        "--tensor-parallel-size=2",
    ]
    flags = [flag for flag in FLAGS if "max-model-len" not in flag] + ["--max-model-len=512"]
    return lambda: ModelServer(tmp_path_factory.mktemp("server"), *arguments, flags=flags)


def find_process(server: ModelServer, name: str) -> psutil.Process:
    """The last of a server's processes with a name."""
    processes = psutil.Process(server.pid).children(recursive=True)
    *_, found = [process for process in processes if name in " ".join(process.cmdline())]
    return found


async def wait_for_tokens(session: aiohttp.ClientSession) -> None:
    """Wait until the open requests have been given some tokens."""
    monitor, name = Monitor(session, pid=None), "vllm:generation_tokens_total"
    before = (await monitor.look()).sample.values[name]
    while (await monitor.look()).sample.values[name] < before + 20:
        await asyncio.sleep(0.01)


async def kill_while_asked(server: ModelServer, name: str) -> list[Outcome]:
    """Open requests, streams and others, kill a process, ask once more: what becomes of them."""
    traffic = Traffic(await inspect(server.url), [LONG], seed=0)
    async with await open_session(server.url, timeout_s=120) as session:
        drawn = [traffic.draw_question() for _ in range(NUM_OPEN)]
        open_requests = []
        for is_stream in (True, False):
            requests = [request for request in drawn if request.is_stream == is_stream]
            assert requests
            open_requests += [asyncio.create_task(send(session, request)) for request in requests]
            await wait_for_tokens(session)
        victim = find_process(server, name).pid
        open_requests = [task for task in open_requests if not task.done()]
        os.kill(victim, signal.SIGKILL)
        assert len(open_requests) > NUM_OPEN // 4
        outcomes = await asyncio.gather(*open_requests)
        return [*outcomes, await send(session, traffic.draw_question())]


def is_error(reason: str) -> bool:
    """Whether a client cannot take it for an answer: an error, or a broken connection."""
    return reason.startswith(("status 5", "the connection broke", "the server reports"))


def ask(server: ModelServer) -> list[int]:
    """A short greedy answer."""
    answer = server.complete("hello", max_tokens=24, ignore_eos=True, return_token_ids=True)
    return answer["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    """What one server after the other answered."""
    return []


@pytest.mark.parametrize("name", ["Worker", "EngineCore"])
def test_server_ends_with_errors_when_a_process_is_killed(
    make_server: Callable[[], ModelServer], answers: list[list[int]], name: str
) -> None:
    with make_server() as server:
        answers.append(ask(server))
        children = psutil.Process(server.pid).children(recursive=True)
        outcomes = asyncio.run(kill_while_asked(server, name))
        # One may have been on its way, whole, when the process died.
        lost = [outcome for outcome in outcomes if outcome.end != End.ANSWERED]
        assert {outcome.end for outcome in lost} == {End.FAULT}
        assert len(lost) > NUM_OPEN // 4
        assert outcomes[-1].end == End.FAULT
        assert [outcome.reason for outcome in lost if not is_error(outcome.reason)] == []
        assert max(outcome.num_tokens for outcome in lost) > 0
        assert max(outcome.seconds for outcome in outcomes) < 60
        server.wait(timeout_s=60)
        _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []


def test_server_answers_alike_when_earlier_ones_were_killed(
    make_server: Callable[[], ModelServer], answers: list[list[int]]
) -> None:
    with make_server() as server:
        answers.append(ask(server))
    assert len(answers) == 3
    assert answers[0] == answers[1] == answers[2]
