"""Sends requests, says how each ended and counts them; what was not to happen is a fault."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import aiohttp

from layerskip_vllm.tools.server.event_stream import StreamError, read_events
from layerskip_vllm.tools.soak.traffic import SCORE, Request
from layerskip_vllm.tools.tokens import first_difference

_MAX_LINE_BYTES = 2**24


class End(Enum):
    """How a request ended."""

    ANSWERED = "answered"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    FAULT = "fault"


class Fault(Exception):
    """The server did what it must not do."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    request: Request
    end: End
    seconds: float
    reason: str = ""  # what the server did wrong; empty if it did not
    num_tokens: int = 0
    num_compared: int = 0  # of the tokens, those that were compared with plain vLLM's


@dataclass
class Row:
    """Requests of one kind."""

    num_sent: int = 0  # begun
    ends: Counter[End] = field(default_factory=Counter)
    num_tokens: int = 0
    num_compared: int = 0  # tokens compared with plain vLLM's, and equal
    longest_s: float = 0.0

    @property
    def num_lost(self) -> int:
        """Requests without any end."""
        return self.num_sent - sum(self.ends.values())


@dataclass
class Tally:
    """All requests of a run."""

    rows: dict[str, Row] = field(default_factory=dict)  # by kind
    total: Row = field(default_factory=Row)
    faults: list[Outcome] = field(default_factory=list)  # in order

    def begin(self, kind: str) -> None:
        """Count a request that is about to be sent."""
        for row in (self.rows.setdefault(kind, Row()), self.total):
            row.num_sent += 1

    def end(self, outcome: Outcome) -> None:
        """Count a request's end."""
        for row in (self.rows[outcome.request.kind], self.total):
            row.ends[outcome.end] += 1
            row.num_tokens += outcome.num_tokens
            row.num_compared += outcome.num_compared
            row.longest_s = max(row.longest_s, outcome.seconds)
        if outcome.end is End.FAULT:
            self.faults.append(outcome)


@dataclass
class _Choice:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class _Received:
    """What has come so far of an answer."""

    choices: dict[int, _Choice] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    num_tokens_by_usage: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in a chunk of a stream, or a whole answer; tokens after an end are a `Fault`."""
        for given in event.get("choices", ()):
            choice = self.choices.setdefault(given["index"], _Choice())
            token_ids = given.get("token_ids") or ()
            if token_ids and choice.finish_reason is not None:
                raise Fault("tokens came after a finish_reason")
            choice.token_ids += token_ids
            choice.finish_reason = given.get("finish_reason") or choice.finish_reason
        self.scores += [float(item["score"]) for item in event.get("data", ())]
        usage = event.get("usage")
        if usage:
            self.num_tokens_by_usage = usage["completion_tokens"]


async def send(session: aiohttp.ClientSession, request: Request) -> Outcome:
    """Send a request and wait for its end; what goes wrong is a fault, not an exception."""
    start_s = time.perf_counter()
    received = _Received()
    end, reason, num_compared = End.FAULT, "", 0
    try:
        exchange = _exchange(session, request, received)
        end = await asyncio.wait_for(exchange, request.cancel_after_s)
        if end is End.ANSWERED:
            _check_whole(request, received)
            _compare_with_first(request, received)
        num_compared = _compare(request, received, end)
    except asyncio.CancelledError:
        end = End.CANCELLED
    except (Fault, StreamError) as error:
        end, reason = End.FAULT, str(error)
    except TimeoutError:
        if request.cancel_after_s is not None:
            end = End.CANCELLED
        else:
            end, reason = End.FAULT, f"no end after {time.perf_counter() - start_s:.1f} s"
    except (aiohttp.ClientError, OSError) as error:
        end, reason = End.FAULT, f"the connection broke: {type(error).__name__}: {error}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        end, reason = End.FAULT, f"an answer of the wrong form: {type(error).__name__}: {error}"
    seconds = time.perf_counter() - start_s
    return Outcome(request, end, seconds, reason, received.num_tokens, num_compared)


async def _exchange(session: aiohttp.ClientSession, request: Request, received: _Received) -> End:
    headers = {"Content-Type": "application/json"}
    async with session.post(
        request.path, data=request.payload, headers=headers, read_bufsize=_MAX_LINE_BYTES
    ) as response:
        if request.is_refused or response.status != 200:
            return _check_refusal(request, response.status, await response.text())
        if not request.is_stream:
            received.add(await response.json())
            return End.ANSWERED
        after = request.cancel_after_tokens
        if after == 0:
            return End.CANCELLED
        async for event in read_events(response.content):
            received.add(event)
            if after is not None and received.num_tokens >= after:
                return End.CANCELLED
    return End.ANSWERED


def _check_refusal(request: Request, status: int, text: str) -> End:
    """Check that a refusal was due, of the right class, and says why."""
    if not request.is_refused:
        raise Fault(f"status {status} for a request that is right: {text[:300]}")
    if not 400 <= status < 500:
        raise Fault(f"status {status} for a request to be refused with a 4xx: {text[:300]}")
    if not _find_message(text):
        raise Fault(f"status {status} without an error message: {text[:300]!r}")
    return End.REFUSED


def _find_message(text: str) -> Any:
    """Find what an error says; FastAPI's own, of bodies that it cannot decode, is a `detail`."""
    try:
        answer = json.loads(text)
        return answer["detail"] if "detail" in answer else answer["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return None


def _check_whole(request: Request, received: _Received) -> None:
    """Check that an answer is whole, whatever its tokens."""
    if request.path == SCORE:
        if len(received.scores) != request.num_choices:
            raise Fault(f"{len(received.scores)} scores, expected {request.num_choices}")
        if not all(0 <= score <= 1 for score in received.scores):
            raise Fault(f"scores are {received.scores}; they must be probabilities")
        return
    if len(received.choices) != request.num_choices:
        raise Fault(f"{len(received.choices)} choices, expected {request.num_choices}")
    for choice in received.choices.values():
        num_tokens, reason = len(choice.token_ids), choice.finish_reason
        if reason not in ("stop", "length"):
            raise Fault(f"finish_reason is {reason!r} after {num_tokens} tokens")
        if num_tokens > request.max_tokens or (
            reason == "length" and num_tokens != request.max_tokens
        ):
            raise Fault(f"{num_tokens} tokens and {reason!r}, expected {request.max_tokens}")
    if received.num_tokens_by_usage != received.num_tokens:
        raise Fault(f"usage says {received.num_tokens_by_usage} tokens, {received.num_tokens} came")


def _compare_with_first(request: Request, received: _Received) -> None:
    """Compare with the first answer to the same request; the first one is kept."""
    if request.repeated is None:
        return
    token_ids, first = received.choices[0].token_ids, request.repeated.token_ids
    if first is None:
        request.repeated.token_ids = token_ids
    elif token_ids != first:
        at = first_difference(token_ids, first)
        raise Fault(
            f"token {at} differs from the first answer's to the same seed: "
            f"{token_ids[at : at + 4]}, before {list(first)[at : at + 4]}"
        )


def _compare(request: Request, received: _Received, end: End) -> int:
    """Compare with plain vLLM's answer; return how many tokens were compared."""
    answer = request.question.answer if request.question else None
    if answer is None or 0 not in received.choices or end is End.REFUSED:
        return 0
    choice = received.choices[0]
    token_ids, expected = choice.token_ids, list(answer.token_ids)
    if end is End.CANCELLED:
        expected = expected[: len(token_ids)]
    if token_ids != expected:
        at = first_difference(token_ids, expected)
        raise Fault(
            f"token {at} differs from plain vLLM's: {token_ids[at : at + 4]}, expected "
            f"{expected[at : at + 4]} ({len(token_ids)} tokens, expected {len(expected)})"
        )
    if end is End.ANSWERED and choice.finish_reason != answer.finish_reason:
        raise Fault(
            f"finish_reason {choice.finish_reason!r}, plain vLLM's {answer.finish_reason!r}"
        )
    return len(token_ids)
