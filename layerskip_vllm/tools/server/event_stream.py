"""The lines of the event streams (SSE) that a server answers with; `soak` and the benchmarks."""

from __future__ import annotations

import json
from typing import Any


class StreamError(RuntimeError):
    """The server refused a request or broke off its stream."""


def parse_sse_line(line: bytes) -> dict[str, Any] | None:
    """Read one line of an event stream.

    Args:
        line: A line as it was received, with or without its line break.

    Returns:
        The JSON object that it carries; None for the empty lines and comments between events, and
        for `[DONE]`, which `is_done_line` tells apart.

    Raises:
        StreamError: If the line is no `data:` line, no JSON object, or the server's error message.
    """
    text = line.decode().strip()
    if not text or text.startswith(":") or is_done_line(line):
        return None
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


def is_done_line(line: bytes) -> bool:
    """Return whether `line` is the one that ends an event stream."""
    return line.strip() == b"data: [DONE]"
