"""A client of vLLM's completions endpoint: greedy, streaming, several requests at once.

`demo` sends each round's prompts through it. `vllm bench serve` measures the same times but keeps
texts alone, and it is the tokens that must not differ.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from layerskip_vllm.tools.server.event_stream import StreamError, read_events

_REQUEST_TIMEOUT_S = 600


@dataclass(frozen=True)
class Completion:
    """What one request streamed back, and when.

    Attributes:
        token_ids: The completion's tokens.
        ttft_s: Seconds from sending the request to its first token.
        latency_s: Seconds from sending the request to its last token.
    """

    token_ids: tuple[int, ...]
    ttft_s: float
    latency_s: float

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None for a single token."""
        if len(self.token_ids) < 2:
            return None
        return (self.latency_s - self.ttft_s) / (len(self.token_ids) - 1)


@dataclass(frozen=True)
class Round:
    """A batch of requests, answered.

    Attributes:
        completions: One a prompt, in the order of the prompts.
        duration_s: Seconds from the first request to the last token.
    """

    completions: tuple[Completion, ...]
    duration_s: float

    @property
    def num_tokens(self) -> int:
        """How many tokens were generated."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, all requests together."""
        return self.num_tokens / self.duration_s


class StreamAssembler:
    """Puts a stream's chunks together; speculative decoding sends several tokens in one chunk."""

    def __init__(self, start_s: float) -> None:
        """Start the request's clock.

        Args:
            start_s: `time.perf_counter()` when the request was sent.
        """
        self._start_s = start_s
        self._first_s: float | None = None
        self._last_s = start_s
        self._token_ids: list[int] = []

    def add(self, event: dict[str, Any], now_s: float) -> int:
        """Take one event in.

        Args:
            event: A chunk of the completions endpoint.
            now_s: `time.perf_counter()` when it was received.

        Returns:
            How many tokens it brought.

        Raises:
            StreamError: If the chunk has text without token ids.
        """
        num_before = len(self._token_ids)
        for choice in event.get("choices", ()):
            if choice.get("token_ids") is None:
                raise StreamError(
                    "the server sent no token_ids though return_token_ids was asked for; "
                    "it must be vLLM 0.32.0 or later."
                )
            self._token_ids += choice["token_ids"]
        num_new = len(self._token_ids) - num_before
        if num_new:
            self._first_s = now_s if self._first_s is None else self._first_s
            self._last_s = now_s
        return num_new

    def finish(self) -> Completion:
        """End the stream.

        Returns:
            The whole completion.

        Raises:
            StreamError: If no token came.
        """
        if self._first_s is None:
            raise StreamError("the server ended a completion without a single token.")
        return Completion(
            token_ids=tuple(self._token_ids),
            ttft_s=self._first_s - self._start_s,
            latency_s=self._last_s - self._start_s,
        )


def ignore_tokens(num_tokens: int) -> None:
    """Do nothing: for rounds whose progress nobody watches."""


async def _complete(
    session: aiohttp.ClientSession,
    model_name: str,
    prompt: str,
    max_tokens: int,
    on_tokens: Callable[[int], None],
) -> Completion:
    body = {
        "model": model_name,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    assembler = StreamAssembler(time.perf_counter())
    async with session.post("/v1/completions", json=body) as response:
        if response.status != 200:
            message = (await response.text())[:500]
            raise StreamError(f"the server answered with status {response.status}: {message}")
        async for event in read_events(response.content):
            on_tokens(assembler.add(event, time.perf_counter()))
    return assembler.finish()


async def complete_round(
    url: str,
    model_name: str,
    prompts: Sequence[str],
    max_tokens: int,
    concurrency: int,
    on_tokens: Callable[[int], None] = ignore_tokens,
) -> Round:
    """Complete all prompts greedily, `concurrency` of them at any time.

    Args:
        url: Address of the server, such as `http://127.0.0.1:8000`.
        model_name: The name under which the server serves its model.
        prompts: The prompts, sent in this order.
        max_tokens: Most tokens to generate a prompt; a completion may end earlier at the EOS token.
        concurrency: How many requests are open at once.
        on_tokens: Called with the number of new tokens whenever some arrive.

    Returns:
        The completions, in the order of the prompts, and how long they took.

    Raises:
        StreamError: If a request fails; the others are cancelled then.
        aiohttp.ClientError: If the server is gone.
    """
    completions: dict[int, Completion] = {}
    timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)  # the workers below are the limit
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:

        async def work(queue: Iterable[tuple[int, str]]) -> None:
            for index, prompt in queue:
                completions[index] = await _complete(
                    session, model_name, prompt, max_tokens, on_tokens
                )

        queue = iter(enumerate(prompts))
        start_s = time.perf_counter()
        workers = [asyncio.create_task(work(queue)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        duration_s = time.perf_counter() - start_s
    return Round(tuple(completions[index] for index in range(len(prompts))), duration_s)
