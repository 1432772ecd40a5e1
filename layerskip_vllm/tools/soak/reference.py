"""What plain vLLM answers to the questions: asked of a plain server, or read from a file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import aiohttp

from layerskip_vllm.tools.server.service import Service, open_session
from layerskip_vllm.tools.soak.questions import Answer, Question

_TIMEOUT_S = 600.0


async def ask_plain(
    service: Service, questions: Sequence[Question], concurrency: int, on_answer: Callable[[], None]
) -> list[Question]:
    """Ask a plain server all questions, `concurrency` at once, and return them with its answers.

    A ValueError says that the server drafts with layerskip or refuses a question, an
    `aiohttp.ClientError` that it is gone.
    """
    if service.num_speculative_tokens is not None:
        raise ValueError(
            f"the server at {service.url} drafts with layerskip; the right answers must come from "
            "one without speculation."
        )
    slots = asyncio.Semaphore(concurrency)
    async with await open_session(service.url, _TIMEOUT_S) as session:

        async def answer(question: Question) -> Question:
            async with slots:
                answered = replace(question, answer=await _ask(session, service.model, question))
                on_answer()
                return answered

        return await asyncio.gather(*(answer(question) for question in questions))


async def _ask(session: aiohttp.ClientSession, model: str, question: Question) -> Answer:
    body = {"model": model, "return_token_ids": True, **question.body}
    async with session.post("v1/completions", json=body) as response:
        if response.status != 200:
            text = (await response.text())[:500]
            raise ValueError(
                f"the plain server answers {response.status} to {question.kind!r}: {text}"
            )
        (choice,) = (await response.json())["choices"]
    return Answer(tuple(choice["token_ids"]), choice["finish_reason"])


def write_reference(path: Path, service: Service, questions: Sequence[Question]) -> None:
    """Write questions and answers to a file."""
    entries = []
    for question in questions:
        assert question.answer is not None
        entries.append({"kind": question.kind, "body": question.body, **asdict(question.answer)})
    content = {"max_model_len": service.max_model_len, "questions": entries}
    path.write_text(json.dumps(content) + "\n")


def read_reference(path: Path, service: Service) -> list[Question]:
    """Read questions and answers to compare a server's with from a file of `write_reference`'s.

    A ValueError says that it is no such file, or was written for another context.
    """
    try:
        content = json.loads(path.read_text())
        max_model_len = content["max_model_len"]
        questions = [
            Question(
                item["kind"], item["body"], Answer(tuple(item["token_ids"]), item["finish_reason"])
            )
            for item in content["questions"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--reference is {str(path)!r}, which is no file of --record's ({error!r})."
        ) from error
    check_context(str(path), max_model_len, service)
    return questions


def check_context(source: str, max_model_len: int, service: Service) -> None:
    """Refuse, by a ValueError, answers of a server with another context, which end elsewhere."""
    if max_model_len != service.max_model_len:
        raise ValueError(
            f"the answers of {source} are of a server whose max_model_len is {max_model_len}, but "
            f"that of {service.url} is {service.max_model_len}; start both with the same."
        )
