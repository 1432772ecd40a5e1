"""The mix of requests: drawn by kind from one seed, each with the outcome that it must have."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerskip_vllm.tools.server.service import Service
from layerskip_vllm.tools.soak import refusals
from layerskip_vllm.tools.soak.questions import Question

COMPLETIONS, CHAT, SCORE = "v1/completions", "v1/chat/completions", "generative_scoring"
_SAMPLED_TOKENS = 32
_NUM_REPEATS = 3


@dataclass
class Repeated:
    """What was answered to a seeded request, which is sent again."""

    token_ids: Sequence[int] | None = None  # None before the first answer


@dataclass(frozen=True)
class Request:
    """What is sent, and what must come back."""

    kind: str  # its row in the report
    detail: str  # what is particular about it
    payload: bytes
    path: str = COMPLETIONS
    is_refused: bool = False  # with a 4xx status; it must be answered otherwise
    question: Question | None = None  # if the answer is compared with plain vLLM's
    repeated: Repeated | None = None  # if the answer is compared with those to the same before
    num_choices: int = 1  # completions, or scores, in an answer
    max_tokens: int = 0  # of each of them
    is_stream: bool = False
    cancel_after_tokens: int | None = None  # when the client leaves a stream; None to read it all
    cancel_after_s: float | None = None  # when the client leaves; None to stay


@dataclass
class Traffic:
    """Draw requests without end; one seed, server and questions give the same ones."""

    service: Service
    questions: Sequence[Question]
    seed: int
    kinds: Sequence[str] = ()  # which of `KINDS` come; all of them if empty
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._malformed = _list_malformed(self.service)

    def draw(self) -> Request:
        """Return the next request."""
        kinds = self.kinds or list(KINDS)
        (kind,) = self._rng.choices(kinds, [KINDS[name][0] for name in kinds])
        return KINDS[kind][1](self)

    def list_alone(self) -> list[Request]:
        """Return one request of each setting, for a server that has nothing else to do.

        A batch of one takes other paths than a batch of many, such as steps without any draft.
        """
        question = self.questions[0]
        sampled = [self._sample_with(name, setting) for name, setting in _SAMPLED.items()]
        greedy = [
            self._ask(question, setting, "one candidate", f"alone, {setting}")
            for setting in _ONE_CANDIDATE
        ]
        return [*greedy, *sampled, *self._repeat_seeds(), self._score()]

    def draw_question(self) -> Request:
        """Return a greedy question, streamed or not, drafted for as the server does or less."""
        question = self._rng.choice(self.questions)
        return self._ask(question, {}, question.kind, "greedy")

    def draw_malformed(self) -> Request:
        """Return a request of the wrong form or with a wrong value."""
        detail, path, payload = self._rng.choice(self._malformed)
        return Request("malformed", detail, payload, path, is_refused=True)

    def _ask_with_one_candidate(self) -> Request:
        """Ask with sampling that leaves the likeliest token alone: the greedy answer."""
        question = self._rng.choice(self.questions)
        setting = self._rng.choice(_ONE_CANDIDATE)
        return self._ask(question, setting, "one candidate", f"{question.kind}, {setting}")

    def _sample(self) -> Request:
        return self._sample_with(*self._rng.choice(list(_SAMPLED.items())))

    def _sample_with(self, name: str, setting: Mapping[str, Any]) -> Request:
        prompt = self._cut_prompt(_SAMPLED_TOKENS)
        num_prompts = self._rng.choice([1, 1, 3])
        prompts = prompt if num_prompts == 1 else [prompt] * num_prompts
        body = {"max_tokens": _SAMPLED_TOKENS, **setting, "prompt": prompts}
        return self._answered("sampled", name, body, num_choices=num_prompts * setting.get("n", 1))

    def _cancel_stream(self) -> Request:
        question = self._rng.choice(self._long_questions())
        after = self._rng.randint(0, max(1, question.body["max_tokens"] // 2))
        detail = f"{question.kind}, after {after} tokens"
        cancel = {"is_stream": True, "cancel_after_tokens": after}
        return self._ask(question, {}, "cancelled stream", detail, **cancel)

    def _cancel(self) -> Request:
        question = self._rng.choice(self._long_questions())
        after_s = self._patience_s()
        detail = f"{question.kind}, after {after_s} s"
        cancel = {"is_stream": False, "cancel_after_s": after_s}
        return self._ask(question, {}, "cancelled", detail, **cancel)

    def _cancel_samples(self) -> Request:
        room = min(128, self.service.max_model_len // 2)
        body = {"prompt": self._cut_prompt(room), "n": 3, "temperature": 1, "max_tokens": room}
        expected = {"num_choices": 3, "cancel_after_s": self._patience_s()}
        return self._answered("cancelled", "three samples", body, **expected)

    def _too_long(self) -> Request:
        context = self.service.max_model_len
        token_ids = [token_id for piece in self.service.pieces for token_id in piece]
        whole = (token_ids * (context // len(token_ids) + 2))[: context + 1]
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("prompt of the context and a token", {"prompt": whole, "max_tokens": 1}),
            ("prompt of the context", {"prompt": whole[:-1], "max_tokens": 1}),
            ("max_tokens above the context", {"prompt": whole[:9], "max_tokens": context + 1}),
            ("a long text", {"prompt": "word " * (8 * context), "max_tokens": 1}),
        ]
        detail, body = self._rng.choice(bodies)
        body = {"model": self.service.model, **body}
        return Request("over-long", detail, json.dumps(body).encode(), is_refused=True)

    def _chat(self) -> Request:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": self._rng.choice(_CHAT_TEXTS)}],
            "max_tokens": _SAMPLED_TOKENS,
            "temperature": self._rng.choice([0, 1]),
        }
        if self.service.is_chat:
            return self._answered("chat", "chat", body, path=CHAT)
        payload = json.dumps({"model": self.service.model, **body}).encode()
        return Request("chat", "no chat template", payload, CHAT, is_refused=True)

    def _repeat_seeds(self) -> list[Request]:
        """Ask seeded requests several times, of which the first alone finds its prompt uncached.

        Beside others a step may have no room for a draft, which draws otherwise from a seed.
        """
        requests = []
        for seed, max_tokens in ((7, _SAMPLED_TOKENS), (0, 2)):
            repeated = Repeated()
            prompt = [token_id for piece in self.service.pieces for token_id in piece][:97]
            body = {"prompt": prompt, "temperature": 1, "seed": seed, "max_tokens": max_tokens}
            expected = {"repeated": repeated, "drafts_fewer": False}
            requests += [
                self._answered("seeded", f"seed {seed}, time {time}", body, **expected)
                for time in range(1, _NUM_REPEATS + 1)
            ]
        return requests

    def _score(self) -> Request:
        """Ask how likely tokens are after each of some items."""
        pieces = [list(piece) for piece in self.service.pieces]
        items = self._rng.sample(pieces, self._rng.randint(1, min(4, len(pieces))))
        labels = sorted(set(self._rng.choice(pieces)))[:20]
        body = {"query": self._rng.choice(pieces), "items": items, "label_token_ids": labels}
        payload = json.dumps({"model": self.service.model, **body}).encode()
        return Request("score", f"{len(items)} items", payload, SCORE, num_choices=len(items))

    def _cut_prompt(self, room: int) -> str | list[int]:
        """Cut a question's prompt so that a completion of `room` tokens fits."""
        prompt = self._rng.choice(self.questions).body["prompt"]
        return prompt if isinstance(prompt, str) else prompt[: self.service.max_model_len - room]

    def _patience_s(self) -> float:
        return round(0.005 + self._rng.expovariate(2.5), 3)

    def _long_questions(self) -> Sequence[Question]:
        slow = ("long answer", "long prompt")
        return [question for question in self.questions if question.kind in slow]

    def _ask(
        self, question: Question, setting: Mapping[str, Any], kind: str, detail: str, **cancel: Any
    ) -> Request:
        prompt, max_tokens = question.body["prompt"], question.body["max_tokens"]
        if not isinstance(prompt, str):
            max_tokens = min(max_tokens, self.service.max_model_len - len(prompt))
        body = {**question.body, **setting}
        expected = {"question": question, "max_tokens": max_tokens, **cancel}
        return self._answered(kind, detail, body, **expected)

    def _answered(
        self, kind: str, detail: str, body: Mapping[str, Any], **expected: Any
    ) -> Request:
        expected = {"max_tokens": body["max_tokens"], **expected}
        drafts_fewer = expected.pop("drafts_fewer", True)
        is_stream = expected.pop("is_stream", None)
        if is_stream is None:
            # vLLM has no log probabilities of prompts in streams.
            is_stream = "prompt_logprobs" not in body and self._rng.random() < 0.5
        body = {"model": self.service.model, "return_token_ids": True, **body}
        if is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        limit = self.service.num_speculative_tokens
        if limit is not None and drafts_fewer and self._rng.random() < 0.25:
            setting = {"num_speculative_tokens": self._rng.randint(0, limit)}
            body |= {"vllm_xargs": {"layerskip": json.dumps(setting)}}
        return Request(kind, detail, json.dumps(body).encode(), is_stream=is_stream, **expected)


def _list_malformed(service: Service) -> list[tuple[str, str, bytes]]:
    """Name, path and payload of each malformed request."""
    body = {"model": service.model, "prompt": "a", "max_tokens": 8}
    fields = dict(refusals.WRONG_FIELDS)
    if service.num_speculative_tokens is not None:
        own = refusals.wrong_layerskip_settings(service.num_speculative_tokens)
        fields = {**fields, **own}
    named = [(name, COMPLETIONS, text) for name, text in refusals.MALFORMED_TEXTS.items()]
    named += [(name, CHAT, text) for name, text in refusals.MALFORMED_TEXTS.items()]
    return named + [
        (name, COMPLETIONS, json.dumps({**body, **change}).encode())
        for name, change in fields.items()
    ]


_CHAT_TEXTS = ("Hello!", "Write a haiku about caches.", "", "\u0000\uffff", "1 + 1 = " * 50)

# Settings of sampling that leave the likeliest token alone.
_ONE_CANDIDATE: Sequence[Mapping[str, Any]] = (
    {"temperature": 2, "top_k": 1},
    {"temperature": 1, "top_p": 1e-6},
    {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 5},
    {"temperature": 2, "min_p": 1},
)

# Settings at their limits, which must be answered all the same.
_SAMPLED: Mapping[str, Mapping[str, Any]] = {
    "temperature 2": {"temperature": 2},
    "temperature just above 0": {"temperature": 1e-6},
    "defaults": {},
    "top_k alone": {"top_k": 5},
    "huge top_k": {"top_k": 2**40},
    "tiny top_p": {"temperature": 2, "top_p": 1e-9},
    "top_k and top_p": {"top_k": 5, "top_p": 0.1, "seed": 0},
    "largest seed": {"seed": 2**63 - 1},
    "smallest seed": {"seed": -(2**63)},
    "four samples": {"n": 4},
    "four seeded samples": {"n": 4, "seed": 7, "temperature": 0.7},
    "two samples": {"n": 2},
    "penalties at their limits": {"presence_penalty": 2, "frequency_penalty": -2},
    "large repetition_penalty": {"repetition_penalty": 1e308},
    "tiny repetition_penalty": {"repetition_penalty": 1e-6},
    "all tokens the likeliest": {"logprobs": 20, "temperature": 2},
    "forced length": {"min_tokens": _SAMPLED_TOKENS},
    "one token": {"max_tokens": 1},
    "long stop strings": {"stop": ["x" * 500, "def ", "\n\n"]},
    "many bad words": {"bad_words": [f"w{index}" for index in range(40)]},
    "one allowed token": {"allowed_token_ids": [5]},
    "min_p 0 and no bias": {"min_p": 0, "logit_bias": {}},
    "min_p, top_p and a bias": {"min_p": 0.1, "top_p": 0.9, "logit_bias": {"5": 9}},
    "a forbidden token": {"logit_bias": {"5": -100}, "temperature": 2},
    "logprobs of tokens": {"logprobs": 1, "logprob_token_ids": [5, 6, 7]},
    "a grammar": {"structured_outputs": {"regex": r"[\s\S]*"}, "ignore_eos": True},
}

# How often each kind comes, and what draws it.
KINDS: Mapping[str, tuple[int, Callable[[Traffic], Request]]] = {
    "question": (44, Traffic.draw_question),
    "one candidate": (8, Traffic._ask_with_one_candidate),
    "sampled": (14, Traffic._sample),
    "cancelled stream": (9, Traffic._cancel_stream),
    "cancelled": (6, Traffic._cancel),
    "cancelled samples": (3, Traffic._cancel_samples),
    "malformed": (10, Traffic.draw_malformed),
    "over-long": (3, Traffic._too_long),
    "chat": (3, Traffic._chat),
    "score": (3, Traffic._score),
}
