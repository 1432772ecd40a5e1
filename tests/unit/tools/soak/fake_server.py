"""A made-up vLLM server in this process, which can misbehave."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from layerskip_vllm.tools.soak.refusals import WRONG_FIELDS, wrong_layerskip_settings

MAX_MODEL_LEN = 256
K = 4
# What it does to a request in the place of answering it, by the number of requests before.
Misbehaviour = Callable[[int, Mapping[str, Any]], str]

METRICS = """\
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_waiting{{engine="0"}} 0
vllm:kv_cache_usage_perc{{engine="0"}} {usage}
vllm:generation_tokens_total{{engine="0"}} {tokens}
vllm:spec_decode_num_drafts_total{{engine="0"}} {drafts}
vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {drafts}
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {drafts}
"""
INFO = f"""\
vllm:layerskip_info{{engine="0",exit_layer="6",exit_layer_source="the user",\
num_speculative_tokens="{K}",num_speculative_tokens_source="the user",\
num_layers="24",exit_adapter="",draft_vocab_size="2048",lookup="off",reuse_exit_states="off"}} 1.0
"""


def behave(index: int, body: Mapping[str, Any]) -> str:
    """Do nothing wrong."""
    return ""


@dataclass
class FakeServer:
    """Completes a prompt with tokens that its hash gives, and refuses what vLLM refuses."""

    misbehave: Misbehaviour = behave
    drafts: bool = True
    num_leaked: int = 0
    kv_cache_usage: float = 0.0
    num_tokens: int = 0
    num_asked: int = 0
    bodies: list[Mapping[str, Any]] = field(default_factory=list)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._refuse_chat)
        app.router.add_post("/generative_scoring", self._score)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": MAX_MODEL_LEN}]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        text = METRICS.format(
            running=self.num_leaked,
            usage=self.kv_cache_usage,
            tokens=self.num_tokens,
            drafts=self.num_tokens if self.drafts else 0,
        )
        return web.Response(text=text + INFO if self.drafts else text)

    async def _refuse_chat(self, request: web.Request) -> web.Response:
        return refuse("there is no chat template")

    async def _score(self, request: web.Request) -> web.Response:
        body = await request.json()
        fault = self.misbehave(self.num_asked, body)
        self.num_asked += 1
        score = 1.5 if fault == "wrong score" else 0.5
        scores = [{"index": index, "score": score} for index in range(len(body["items"]))]
        return web.json_response({"data": scores[fault == "lost choice" :]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.read())
        except ValueError:
            return refuse("no JSON")
        if not isinstance(body, dict):
            return refuse("no object")
        self.bodies.append(body)
        fault = self.misbehave(self.num_asked, body)
        self.num_asked += 1
        if is_wrong(body) or is_too_long(body):
            return refuse_wrongly(fault) if fault else refuse("it is wrong")
        if fault == "status 500":
            return web.Response(status=500, text="an internal error")
        if fault == "hang":
            await asyncio.sleep(2)
        if fault == "drop" and request.transport is not None:
            request.transport.abort()
        return await self._answer(request, body, fault)

    async def _answer(
        self, request: web.Request, body: Mapping[str, Any], fault: str
    ) -> web.StreamResponse:
        prompts = body["prompt"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        choices = []
        for prompt in prompts:
            for _ in range(body.get("n", 1)):
                length = 0 if isinstance(prompt, str) else len(prompt)
                max_tokens = min(body.get("max_tokens", 16), MAX_MODEL_LEN - length)
                token_ids = complete(prompt, max_tokens)
                if fault == "wrong token":
                    token_ids[-1] += 1
                if fault == "wrong tokens":
                    token_ids = [token_id + 1 for token_id in token_ids]
                if fault == "short answer":
                    token_ids = token_ids[:-1]
                choices.append(
                    {
                        "index": len(choices),
                        "token_ids": token_ids,
                        "prompt_token_ids": list(prompt.encode()) if prompt == str(prompt) else [],
                        "finish_reason": None if fault == "no finish" else "length",
                    }
                )
        if fault == "lost choice":
            choices.pop()
        num_tokens = sum(len(choice["token_ids"]) for choice in choices)
        self.num_tokens += num_tokens
        usage = {"completion_tokens": num_tokens + (fault == "wrong usage")}
        if body.get("stream"):
            return await stream(request, choices, usage, fault)
        await asyncio.sleep(0.002)
        return web.json_response({"choices": choices, "usage": usage})


async def stream(
    request: web.Request, choices: list[dict[str, Any]], usage: dict[str, int], fault: str
) -> web.StreamResponse:
    """Stream the choices, a token an event."""
    response = web.StreamResponse()
    await response.prepare(request)

    async def write(event: Mapping[str, Any]) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())

    for choice in choices:
        for token_id in choice["token_ids"]:
            await write({"choices": [{"index": choice["index"], "token_ids": [token_id]}]})
            if fault == "broken stream":
                return response
            if fault == "error in stream":
                await write({"error": {"message": "the engine is dead"}})
        end = {key: choice[key] for key in ("index", "finish_reason")}
        await write({"choices": [{**end, "token_ids": []}]})
    await write({"choices": [], "usage": usage})
    await response.write(b"data: [DONE]\n\n")
    return response


def complete(prompt: Any, num_tokens: int) -> list[int]:
    """The tokens after a prompt."""
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    return [digest[index % 32] for index in range(num_tokens)]


def refuse(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)


def refuse_wrongly(fault: str) -> web.Response:
    if fault == "accept":
        return web.json_response({"choices": []})
    assert fault == "no message"
    return web.Response(status=400)


def is_wrong(body: Mapping[str, Any]) -> bool:
    changes = [*WRONG_FIELDS.values(), *wrong_layerskip_settings(K).values()]
    return any(
        all(key in body and repr(body[key]) == repr(value) for key, value in change.items())
        for change in changes
        if change != WRONG_FIELDS["stream_options without stream"] or "stream" not in body
    )


def is_too_long(body: Mapping[str, Any]) -> bool:
    prompt = body["prompt"]
    if isinstance(prompt, str):
        return len(prompt) > 4 * MAX_MODEL_LEN
    return len(prompt) >= MAX_MODEL_LEN or body.get("max_tokens", 0) > MAX_MODEL_LEN
