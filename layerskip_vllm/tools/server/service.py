"""What a running server is: its model, its context, whether it drafts with layerskip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from layerskip_vllm.tools.prompts import BUILT_IN
from layerskip_vllm.tools.server.metrics import LayerSkipInfo, check_url

MIN_MODEL_LEN = 256
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Service:
    """A server that is up."""

    url: str
    model: str
    max_model_len: int
    num_speculative_tokens: int | None  # K if it drafts with layerskip, else None
    pieces: tuple[tuple[int, ...], ...]  # the built-in prompts as its tokens
    is_chat: bool  # it has no chat template otherwise


async def open_session(url: str, timeout_s: float) -> aiohttp.ClientSession:
    """Open a session whose requests have a connection and `timeout_s` seconds each.

    A server may close a kept connection in the moment in which it is used again; an answer would
    seem lost.
    """
    check_url(url)
    return aiohttp.ClientSession(
        url.rstrip("/") + "/",
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
    )


async def inspect(url: str) -> Service:
    """Ask a server what it is.

    A ValueError says that it is no vLLM server, or does not answer as one; an `aiohttp.ClientError`
    that there is none.
    """
    async with await open_session(url, _TIMEOUT_S) as session:
        status, models = await _fetch(session, "v1/models")
        if status != 200 or not models.get("data"):
            raise ValueError(
                f"URL is {url!r}, but /v1/models there answers {status}; it must be a vLLM "
                "server's address."
            )
        model, max_model_len = models["data"][0]["id"], models["data"][0].get("max_model_len")
        if not isinstance(max_model_len, int):
            raise ValueError(f"the server at {url} names no max_model_len; it must be vLLM's.")
        if max_model_len < MIN_MODEL_LEN:
            raise ValueError(
                f"max_model_len of the server at {url} is {max_model_len}; it must be at least "
                f"{MIN_MODEL_LEN} for long and short requests."
            )
        async with session.get("metrics") as response:
            info = LayerSkipInfo.read(text_string_to_metric_families(await response.text()))
        return Service(
            url=url,
            model=model,
            max_model_len=max_model_len,
            num_speculative_tokens=info.num_speculative_tokens if info else None,
            pieces=await _tokenize(session, url, model),
            is_chat=await _can_chat(session, model),
        )


async def _tokenize(
    session: aiohttp.ClientSession, url: str, model: str
) -> tuple[tuple[int, ...], ...]:
    body = {
        "model": model,
        "prompt": list(BUILT_IN),
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
    }
    status, answer = await _fetch(session, "v1/completions", body)
    if status != 200:
        raise ValueError(f"{url} answers a completion with {status}: {str(answer)[:500]}")
    return tuple(tuple(choice["prompt_token_ids"]) for choice in answer["choices"])


async def _can_chat(session: aiohttp.ClientSession, model: str) -> bool:
    messages = [{"role": "user", "content": "1"}]
    body = {"model": model, "messages": messages, "max_tokens": 1}
    status, _ = await _fetch(session, "v1/chat/completions", body)
    return status == 200


async def _fetch(
    session: aiohttp.ClientSession, path: str, body: Mapping[str, Any] | None = None
) -> tuple[int, dict[str, Any]]:
    """GET, or POST: the status, and the answer's object, empty if it is none."""
    method = "GET" if body is None else "POST"
    async with session.request(method, path, json=body) as response:
        try:
            answer = await response.json(content_type=None)
        except ValueError:
            answer = None
        return response.status, answer if isinstance(answer, dict) else {}
