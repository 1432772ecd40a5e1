"""The event streams (SSE) that a server answers with, read for `soak` and the benchmarks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any


class StreamError(RuntimeError):
    """The server refused a request or broke off its stream."""


async def read_events(lines: AsyncIterable[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON objects of an event stream's lines up to its `[DONE]`.

    A StreamError says that a line is no `data:` line, no JSON object or the server's error message,
    or that the stream ends before it is done.
    """
    async for line in lines:
        text = line.decode().strip()
        if text == "data: [DONE]":
            return
        if text and not text.startswith(":"):  # an empty line or a comment between events
            yield _parse(text)
    raise StreamError("the stream broke off without an error")


def _parse(text: str) -> dict[str, Any]:
    if not text.startswith("data:"):
        raise StreamError(f"expected a 'data:' line from the server, got {text[:200]!r}.")
    try:
        event = json.loads(text.removeprefix("data:"))
    except json.JSONDecodeError as error:
        raise StreamError(f"expected JSON from the server, got {text[:200]!r}.") from error
    if not isinstance(event, dict):
        raise StreamError(f"expected a JSON object from the server, got {text[:200]!r}.")
    if "error" in event:
        raise StreamError(f"the server reports: {event['error']}")
    return event
