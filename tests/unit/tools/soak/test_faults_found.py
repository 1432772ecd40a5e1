"""That a soak finds whatever a server does wrong, and nothing where it does nothing wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from layerskip_vllm.tools.server.service import inspect
from layerskip_vllm.tools.soak import monitor
from layerskip_vllm.tools.soak.client import End
from layerskip_vllm.tools.soak.command import SoakConfig
from layerskip_vllm.tools.soak.questions import make_questions
from layerskip_vllm.tools.soak.reference import ask_plain
from layerskip_vllm.tools.soak.run import Soak, run_soak
from tests.unit.tools.soak.fake_server import FakeServer, Misbehaviour, behave


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerskip_vllm.tools.soak.run._PAUSE_S", 0.0)


def soak(server: FakeServer, **settings: Any) -> Soak:
    """Soak a fake server, with the answers of one that does nothing wrong."""
    config = SoakConfig(
        **{"num_requests": 150, "concurrency": 4, "num_questions": 20, "timeout_s": 5.0, **settings}
    )

    async def run() -> Soak:
        async with FakeServer(drafts=False).serve() as url:
            plain = await inspect(url)
            questions = make_questions(plain, config.num_questions, config.seed)
            questions = await ask_plain(plain, questions, 4, lambda: None)
        misbehave, server.misbehave = server.misbehave, behave
        async with server.serve() as url:
            service = await inspect(url)
            server.misbehave, server.num_asked = misbehave, 0
            return await run_soak(config, service, questions, lambda soak: None)

    return asyncio.run(run())


def once(fault: str, **wanted: Any) -> Misbehaviour:
    """Misbehave to the first request that has what is wanted."""
    done: list[int] = []

    def misbehave(index: int, body: Mapping[str, Any]) -> str:
        is_it = all(body.get(key) == value for key, value in wanted.items())
        if done or index < 10 or not is_it:
            return ""
        done.append(index)
        return fault

    return misbehave


def test_soak_accounts_for_every_request_when_the_server_does_nothing_wrong() -> None:
    server = FakeServer()
    result = soak(server, num_requests=300)
    total = result.tally.total
    assert result.tally.faults == []
    assert result.is_passed
    assert total.num_sent >= 300
    assert total.num_sent == sum(total.ends.values())
    assert min(total.ends[end] for end in (End.ANSWERED, End.REFUSED, End.CANCELLED)) > 10
    assert total.num_compared > 1000


GREEDY = {"temperature": 0, "n": None, "stream": None}
STREAM = {"temperature": 0, "stream": True}
WRONG: dict[str, Any] = {"prompt": "a"}


@pytest.mark.parametrize(
    ("fault", "wanted", "reason"),
    [
        ("status 500", GREEDY, "status 500 for a request that is right: an internal error"),
        ("drop", GREEDY, "the connection broke"),
        ("wrong token", GREEDY, "differs from plain vLLM's"),
        ("wrong token", STREAM, "differs from plain vLLM's"),
        ("short answer", GREEDY, "tokens and 'length', expected"),
        ("no finish", GREEDY, "finish_reason is None"),
        ("no finish", STREAM, "finish_reason is None"),
        ("lost choice", GREEDY, "0 choices, expected 1"),
        ("wrong usage", GREEDY, "usage says"),
        ("broken stream", STREAM, "the stream broke off without an error"),
        ("error in stream", STREAM, "the engine is dead"),
        ("accept", WRONG, "status 200 for a request to be refused"),
        ("no message", WRONG, "status 400 without an error message"),
    ],
)
def test_soak_finds_a_fault_when_the_server_misbehaves_once(
    fault: str, wanted: Mapping[str, Any], reason: str
) -> None:
    # Cancelled requests are left out: one of them may not live to see the fault.
    kinds = ("malformed",) if wanted is WRONG else ("question",)
    result = soak(FakeServer(once(fault, **wanted)), num_requests=60, kinds=kinds)
    assert not result.is_passed
    (found,) = result.tally.faults
    assert reason in found.reason
    assert result.tally.total.num_lost == 0
    assert [check.name for check in result.checks if not check.is_passed] == [
        "each request ended as it must"
    ]


def test_soak_finds_a_hang_when_an_answer_takes_too_long() -> None:
    server = FakeServer(once("hang", **GREEDY))
    result = soak(server, kinds=("question",), num_requests=60, timeout_s=1.5)
    # A busy machine says so a little later.
    assert any(found.reason.startswith("no end after ") for found in result.tally.faults)


def test_soak_finds_wrong_tokens_when_it_leaves_a_stream() -> None:
    server = FakeServer(once("wrong tokens", stream=True))
    result = soak(server, kinds=("cancelled stream",), num_requests=60)
    (found,) = result.tally.faults
    assert "token 0 differs from plain vLLM's" in found.reason


def test_soak_finds_another_answer_when_a_seed_is_asked_again() -> None:
    """What the first of three asks was answered is wrong, so that the others differ from it."""
    server = FakeServer(once("wrong token", seed=7, temperature=1))
    result = soak(server)
    assert [found.request.kind for found in result.tally.faults] == ["seeded", "seeded"]
    assert "differs from the first answer's to the same seed" in result.tally.faults[0].reason


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("lost choice", "scores, expected"), ("wrong score", "they must be probabilities")],
)
def test_soak_finds_a_fault_when_items_are_scored(fault: str, reason: str) -> None:
    result = soak(FakeServer(once(fault)), kinds=("score",), num_requests=40)
    (found,) = result.tally.faults
    assert reason in found.reason


def test_soak_stops_when_faults_are_too_many() -> None:
    server = FakeServer(lambda index, body: "status 500")
    result = soak(server, kinds=("question",), max_faults=4, num_requests=10_000)
    assert 4 <= len(result.tally.faults) <= 8


@pytest.mark.parametrize(
    ("left", "detail"),
    [
        ({"num_leaked": 1}, "1 running, 0 waiting, 0.00%"),
        ({"kv_cache_usage": 0.01}, "0 running, 0 waiting, 1.00%"),
    ],
)
def test_soak_finds_a_leak_when_something_is_left(
    monkeypatch: pytest.MonkeyPatch, left: dict[str, Any], detail: str
) -> None:
    monkeypatch.setattr("layerskip_vllm.tools.soak.run._IDLE_TIMEOUT_S", 0.7)
    result = soak(FakeServer(**left))
    (failed,) = [check for check in result.checks if not check.is_passed]
    assert failed.name == "no request and no KV block is left"
    assert failed.detail.startswith(detail)


def test_soak_finds_a_server_that_does_not_draft() -> None:
    class Undrafting(FakeServer):
        @property
        def num_tokens(self) -> int:
            return 0

        @num_tokens.setter
        def num_tokens(self, value: int) -> None:
            pass

    (failed,) = [check for check in soak(Undrafting()).checks if not check.is_passed]
    assert failed.name == "the same server drafted all the time"


def test_soak_finds_a_server_that_was_started_anew() -> None:
    server = FakeServer()

    def restart(index: int, body: Mapping[str, Any]) -> str:
        if index == 100:
            server.num_tokens = 0
        return ""

    server.misbehave = restart
    result = soak(server, interval_s=0.02, num_requests=400)
    (failed,) = [check for check in result.checks if not check.is_passed]
    assert "started anew" in failed.detail


@pytest.mark.parametrize(("mib_a_look", "is_flat"), [(0.0, True), (5.0, False)])
def test_soak_finds_growing_memory_when_it_watches_a_process(
    monkeypatch: pytest.MonkeyPatch, mib_a_look: float, is_flat: bool
) -> None:
    seen: list[int] = []

    def read(pid: int) -> float:
        seen.append(pid)
        return 1000 + mib_a_look * len(seen)

    monkeypatch.setattr(monitor, "read_memory_mib", read)
    result = soak(FakeServer(), pid=7, interval_s=0.01, num_requests=300, max_growth_mib=16)
    (check,) = [check for check in result.checks if check.name == "memory is flat"]
    assert check.is_passed == is_flat, check.detail
    assert set(seen) == {7}
