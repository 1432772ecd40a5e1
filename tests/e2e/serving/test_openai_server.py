"""What else the OpenAI server takes: chat, tool calls, streams, scores, a checkpoint's defaults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.e2e.serving.server import ModelServer
from tests.support.engine_process import RUNNERS
from tests.support.engines import Engines
from tests.support.scenarios import Request, Scenario

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "which way"}]
PROMPT = "user: which way\n"
TOOL = {
    "type": "function",
    "function": {
        "name": "turn",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"to": {"enum": ["left", "right"]}, "far": {"type": "boolean"}},
            "required": ["to", "far"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module", params=RUNNERS)
def server(
    request: pytest.FixtureRequest,
    checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ModelServer]:
    folder = tmp_path_factory.mktemp("server")
    template = folder / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    Path(folder, "generation_config.json").write_text('{"min_p": 1.0}')
    with ModelServer(
        folder,
        str(checkpoint("llama")),
        "--speculative-model=layerskip",
        "--num-speculative-tokens=3",
        "--spec-exit-layer=2",
        f"--chat-template={template}",
        f"--generation-config={folder}",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
        '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
        variables=RUNNERS[request.param],
    ) as server:
        assert f"Model Runner {request.param.upper()}" in server.log
        yield server


def chat(server: ModelServer, **parameters: Any) -> str:
    body = {"model": "model", "messages": MESSAGES, "temperature": 0, **parameters}
    return server.fetch("/v1/chat/completions", body)


@pytest.mark.feature("Requests", "chat")
def test_chat_gives_plain_vllms_text_when_drafting(
    server: ModelServer, engines: Engines, checkpoint: Callable[..., Path]
) -> None:
    model = checkpoint("llama")
    prompt = tuple(AutoTokenizer.from_pretrained(model).encode(PROMPT))
    (plain,) = engines.serve("v1", Scenario(str(model), (Request(prompt, {"max_tokens": 20}),)))
    expected = plain.outputs[0].completions[0].text
    before = server.counters()
    answer = json.loads(chat(server, max_tokens=20, ignore_eos=True))
    assert answer["choices"][0]["message"]["content"] == expected
    assert server.counters().num_drafts > before.num_drafts


@pytest.mark.feature("Requests", "streaming")
def test_stream_gives_the_text_of_the_whole_answer_when_drafting(server: ModelServer) -> None:
    parameters = {"max_tokens": 20, "ignore_eos": True}
    whole = json.loads(chat(server, **parameters))["choices"][0]["message"]["content"]
    lines = chat(server, stream=True, **parameters).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line[6:7] == "{"]
    texts = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(texts) == whole
    # Several tokens of a draft come in one event.
    assert sum(map(bool, texts)) < 20


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "turn"}}], ids=str
)
@pytest.mark.feature("Requests", "tool calls")
def test_tool_is_called_with_valid_arguments_when_drafting(
    server: ModelServer, choice: Any
) -> None:
    before = server.counters()
    answer = json.loads(chat(server, tools=[TOOL], tool_choice=choice, max_tokens=120))
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "turn"
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["to"] in ("left", "right")
    assert isinstance(arguments["far"], bool)
    assert server.counters().num_drafts > before.num_drafts


def test_server_scores_items_when_it_drafts_for_others(server: ModelServer) -> None:
    body = {"query": "def f(", "items": ["a", "b"], "label_token_ids": [5, 6, 7]}
    answer = json.loads(server.fetch("/generative_scoring", body))
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert all(0 < item["score"] < 1 for item in answer["data"])


@pytest.mark.feature("Requests", "`min_p` of a `generation_config.json`")
def test_request_is_answered_when_the_checkpoint_sets_min_p(server: ModelServer) -> None:
    """The default of every request that does not say otherwise; with 1, the likeliest token."""

    def complete(**parameters: Any) -> str:
        answer = server.complete("hello", max_tokens=12, ignore_eos=True, **parameters)
        return str(answer["choices"][0]["text"])

    assert complete(temperature=1) == complete(temperature=0)
    assert complete(temperature=2, min_p=0) != complete(temperature=0)
