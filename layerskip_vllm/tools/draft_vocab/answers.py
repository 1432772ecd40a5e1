"""A running server's answers, as tokens: what drafts will have to name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from layerskip_vllm.tools.server.service import open_session

NUM_AT_ONCE = 16
TIMEOUT_S = 600.0


def collect_answers(url: str, prompts: Sequence[str], max_tokens: int) -> list[int]:
    """Have a server complete prompts by its own sampling, and return all tokens of the answers.

    `ValueError` if it refuses one.
    """
    return asyncio.run(_collect(url, prompts, max_tokens))


async def _collect(url: str, prompts: Sequence[str], max_tokens: int) -> list[int]:
    slots = asyncio.Semaphore(NUM_AT_ONCE)
    async with await open_session(url, TIMEOUT_S) as session:
        async with session.get("v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        body = {"model": model, "max_tokens": max_tokens, "return_token_ids": True}
        answers = await asyncio.gather(
            *(_ask(session, slots, {**body, "prompt": prompt}) for prompt in prompts)
        )
    return [token_id for answer in answers for token_id in answer]


async def _ask(
    session: aiohttp.ClientSession, slots: asyncio.Semaphore, body: dict[str, Any]
) -> list[int]:
    async with slots, session.post("v1/completions", json=body) as response:
        if response.status != 200:
            text = await response.text()
            raise ValueError(
                f"the server answers a completion with {response.status}: {text[:500]}"
            )
        answer = await response.json()
        token_ids: list[int] = answer["choices"][0]["token_ids"]
        return token_ids
