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

from layerskip_vllm.tools.server.event_stream import StreamError, read_events
from layerskip_vllm.tools.server.service import inspect, open_session
from layerskip_vllm.tools.soak.client import End, Outcome, send
from layerskip_vllm.tools.soak.questions import Question
from layerskip_vllm.tools.soak.traffic import Request, Traffic
from tests.e2e.serving.server import FLAGS, ModelServer

pytestmark = pytest.mark.timeout(1800)

# Many times what the server runs at once.
NUM_OPEN = 32
LONG = Question(
    "long answer",
    {"prompt": "hello", "max_tokens": 1900, "temperature": 0, "ignore_eos": True},
)


@pytest.fixture(scope="module")
def make_server(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], ModelServer]:
    """Servers alike, each with two tensor-parallel workers."""
    arguments = [
        str(checkpoint("llama", max_position_embeddings=2048)),
        "--speculative-model=layerskip",
        "--spec-exit-layer=4",
        "--tensor-parallel-size=2",
    ]
    flags = [flag for flag in FLAGS if "max-model-len" not in flag] + ["--max-model-len=2048"]
    return lambda: ModelServer(tmp_path_factory.mktemp("server"), *arguments, flags=flags)


def find_process(server: ModelServer, name: str) -> psutil.Process:
    """The last of a server's processes with a name."""
    processes = psutil.Process(server.pid).children(recursive=True)
    *_, found = [process for process in processes if name in " ".join(process.cmdline())]
    return found


async def kill_when_it_begins(session: aiohttp.ClientSession, request: Request, pid: int) -> None:
    """Kill a process when a stream has begun: the stream must not end as if it were whole."""
    async with session.post(
        request.path, data=request.payload, headers={"Content-Type": "application/json"}
    ) as response:
        events = read_events(response.content)
        await anext(events)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises((StreamError, aiohttp.ClientError), match=r"^(?!the stream broke off)"):
            async for _ in events:
                pass


async def kill_while_asked(server: ModelServer, name: str) -> list[Outcome]:
    """Open requests, streams and others, kill a process, ask once more: what becomes of them."""
    traffic = Traffic(await inspect(server.url), [LONG], seed=0)
    async with await open_session(server.url, timeout_s=120) as session:
        drawn = [traffic.draw_question() for _ in range(NUM_OPEN)]
        stream = next(request for request in drawn if request.is_stream)
        victim = find_process(server, name).pid
        # The server answers in order: some are answered before the stream, the others wait.
        before, after = drawn[:6], drawn[6:]
        requests = [asyncio.create_task(send(session, request)) for request in before]
        await asyncio.sleep(0.1)
        killed = asyncio.create_task(kill_when_it_begins(session, stream, victim))
        await asyncio.sleep(0.1)
        requests += [asyncio.create_task(send(session, request)) for request in after]
        await killed
        outcomes = await asyncio.gather(*requests)
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
        # The first ones may have ended before.
        lost = [outcome for outcome in outcomes if outcome.end != End.ANSWERED]
        assert {outcome.end for outcome in lost} == {End.FAULT}
        assert len(lost) > NUM_OPEN // 4
        assert outcomes[-1].end == End.FAULT
        assert [outcome.reason for outcome in lost if not is_error(outcome.reason)] == []
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
