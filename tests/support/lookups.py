"""Requests whose text repeats itself, and engines that copy their drafts from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tests.support.scenarios import Request, Scenario, layerskip, tokens

K = 3
EXIT_LAYER = 2


def repeating(length: int, token_ids: Iterable[int], max_tokens: int = 30, **more: Any) -> Request:
    """Make a request whose text is of few tokens, of which the exit's drafts know nothing."""
    params = {"allowed_token_ids": list(token_ids), "max_tokens": max_tokens}
    return Request(tokens(length), params | more.pop("params", {}), **more)


def copying(
    model: object, *requests: Request, settings: Mapping[str, Any] | None = None, **engine: Any
) -> Scenario:
    """Make an engine that copies drafts, for three requests at once."""
    speculative = layerskip(EXIT_LAYER, K, lookup="auto") | dict(settings or {})
    return Scenario(str(model), requests, speculative, {"max_num_seqs": 3} | engine)


def without_lookup(scenario: Scenario) -> Scenario:
    """Make the same with the exit's drafts alone."""
    return replace(scenario, speculative=layerskip(EXIT_LAYER, K))
