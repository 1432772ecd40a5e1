"""The completions client against made-up streams and a made-up server."""

import asyncio
import json

import pytest
from aiohttp import web

from benchmarks.serving.client import (
    Completion,
    Round,
    StreamAssembler,
    complete_round,
)
from layerskip_vllm.tools.server.event_stream import StreamError


def make_event(text, token_ids):
    return {"choices": [{"index": 0, "text": text, "token_ids": token_ids}]}


def test_assembler_joins_chunks_and_times_the_first_token():
    assembler = StreamAssembler(start_s=10.0)
    assert assembler.add(make_event("ab", [1]), now_s=10.5) == 1
    assert assembler.add(make_event("cde", [2, 3, 4]), now_s=11.0) == 3
    assert assembler.add({"choices": [], "usage": {}}, now_s=12.0) == 0
    completion = assembler.finish()
    assert completion == Completion((1, 2, 3, 4), ttft_s=0.5, latency_s=1.0)
    assert completion.tpot_s == pytest.approx(0.5 / 3)


def test_assembler_raises_when_the_server_sends_no_token_ids():
    with pytest.raises(StreamError, match="token_ids"):
        StreamAssembler(0.0).add({"choices": [{"text": "a"}]}, 1.0)


def test_assembler_raises_when_no_token_came():
    with pytest.raises(StreamError, match="single token"):
        StreamAssembler(0.0).finish()


def test_tpot_is_none_when_there_is_one_token():
    assert Completion((1,), ttft_s=1.0, latency_s=1.0).tpot_s is None


def test_round_counts_all_tokens_a_second():
    completion = Completion((1, 2), ttft_s=0.1, latency_s=0.2)
    assert Round((completion, completion), duration_s=2.0).tokens_per_s == 2.0


class FakeServer:
    """Streams each prompt back a character at a time, its code points as token ids."""

    def __init__(self, last_line="data: [DONE]\n\n", status=200):
        self.last_line = last_line
        self.status = status
        self.bodies = []
        self.num_open = 0
        self.max_open = 0

    async def answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.Response(status=self.status, text="prompt is too long")
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        response = web.StreamResponse()
        await response.prepare(request)
        for character in body["prompt"][: body["max_tokens"]]:
            event = make_event(character, [ord(character)])
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await asyncio.sleep(0.005)
        await response.write(self.last_line.encode())
        self.num_open -= 1
        return response

    def run(self, prompts, **arguments):
        async def serve_and_ask():
            app = web.Application()
            app.router.add_post("/v1/completions", self.answer)
            runner = web.AppRunner(app)
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                port = runner.addresses[0][1]
                return await complete_round(
                    f"http://127.0.0.1:{port}", "model", prompts, **arguments
                )
            finally:
                await runner.cleanup()

        return asyncio.run(serve_and_ask())


def test_complete_round_keeps_the_order_and_the_concurrency():
    server = FakeServer()
    seen = []
    prompts = ["abcdef", "g", "hijk", "lm", "nopq"]
    round_ = server.run(prompts, max_tokens=4, concurrency=2, on_tokens=seen.append)
    expected = [tuple(map(ord, prompt[:4])) for prompt in prompts]
    assert [completion.token_ids for completion in round_.completions] == expected
    assert sum(seen) == round_.num_tokens == 4 + 1 + 4 + 2 + 4
    assert server.max_open == 2
    assert {body["temperature"] for body in server.bodies} == {0}
    assert all(body["stream"] and body["return_token_ids"] for body in server.bodies)


def test_complete_round_raises_when_a_request_is_refused():
    with pytest.raises(StreamError, match="status 400: prompt is too long"):
        FakeServer(status=400).run(["a", "b", "c"], max_tokens=4, concurrency=2)


def test_complete_round_raises_when_a_stream_breaks_off():
    with pytest.raises(StreamError, match="broke off"):
        FakeServer(last_line="").run(["abc"], max_tokens=4, concurrency=1)
