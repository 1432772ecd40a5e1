"""Greedy questions: what a server answers must be what plain vLLM answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from layerskip_vllm.tools.prompts import BUILT_IN
from layerskip_vllm.tools.server.service import Service

# Longer prompts are only refused ones: a soak is to send many requests, not few long ones.
MAX_PROMPT_TOKENS = 4096
_MAX_TOKENS = 48


@dataclass(frozen=True)
class Answer:
    """A completion of one prompt."""

    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class Question:
    """A greedy request."""

    kind: str  # what is particular about it
    body: Mapping[str, Any]  # for `/v1/completions`, without the model
    answer: Answer | None = None  # plain vLLM's; None if nobody asked it


def make_questions(service: Service, num_questions: int, seed: int) -> list[Question]:
    """Make questions of every kind in turn; one seed and server give the same ones."""
    writer = _Writer(service, random.Random(seed))
    kinds = list(writer.kinds().items())
    questions = []
    for index in range(num_questions):
        kind, write = kinds[index % len(kinds)]
        questions.append(Question(kind, {"temperature": 0, **write()}))
    return questions


class _Writer:
    """Write bodies of questions; every draw comes from one generator."""

    def __init__(self, service: Service, rng: random.Random) -> None:
        self._rng = rng
        self._pieces = service.pieces
        self._context = service.max_model_len
        self._longest = min(service.max_model_len, MAX_PROMPT_TOKENS)
        self._max_tokens = max(1, min(_MAX_TOKENS, service.max_model_len // 8))

    def kinds(self) -> dict[str, Callable[[], dict[str, Any]]]:
        kinds = {
            "short": self._short,
            "long prompt": self._long_prompt,
            "long answer": self._long_answer,
            "common prefix": self._common_prefix,
            "penalties": self._penalties,
            "stop": self._stop,
            "logprobs": self._logprobs,
            "token logprobs": self._token_logprobs,
            "biases": self._biases,
            "tiny prompt": self._tiny_prompt,
            "grammar": self._grammar,
            "allowed tokens": self._allowed_tokens,
            "forced length": self._forced_length,
        }
        if self._context == self._longest:
            kinds["context end"] = self._context_end
        return kinds

    def _text(self, num_tokens: int) -> list[int]:
        token_ids: list[int] = []
        while len(token_ids) < num_tokens:
            token_ids += self._rng.choice(self._pieces)
        return token_ids[:num_tokens]

    def _length(self) -> int:
        return self._rng.randint(1, self._max_tokens)

    def _short(self) -> dict[str, Any]:
        return {"prompt": self._rng.choice(BUILT_IN), "max_tokens": self._length()}

    def _long_prompt(self) -> dict[str, Any]:
        num_tokens = self._rng.randint(self._longest // 4, 3 * self._longest // 4)
        return {"prompt": self._text(num_tokens), "max_tokens": self._length()}

    def _long_answer(self) -> dict[str, Any]:
        return {
            "prompt": self._text(self._rng.randint(1, 16)),
            "max_tokens": min(256, self._longest // 2),
            "ignore_eos": True,
        }

    def _common_prefix(self) -> dict[str, Any]:
        # Always the same beginning, so that a prefix cache has it, and a few tokens more.
        prefix = [token_id for piece in self._pieces for token_id in piece][: self._longest // 3]
        return {
            "prompt": prefix + self._text(self._rng.randint(0, 5)),
            "max_tokens": self._length(),
        }

    def _context_end(self) -> dict[str, Any]:
        # vLLM cuts what is past the context, up to the whole of it.
        room = self._rng.randint(1, 12)
        return {
            "prompt": self._text(self._context - room),
            "max_tokens": self._rng.choice([room, self._context]),
            "ignore_eos": True,
        }

    def _penalties(self) -> dict[str, Any]:
        settings: list[dict[str, float]] = [
            {"presence_penalty": 2.0, "frequency_penalty": 2.0},
            {"presence_penalty": -2.0, "frequency_penalty": -2.0},
            {"repetition_penalty": 1.9},
            {"repetition_penalty": 0.5, "frequency_penalty": 2.0},
        ]
        return {**self._short(), **self._rng.choice(settings)}

    def _stop(self) -> dict[str, Any]:
        settings: list[dict[str, Any]] = [
            {"stop": ["\n", "e"]},
            {"stop": ["self", " the", "0"], "include_stop_str_in_output": True},
            {"stop_token_ids": sorted(set(self._text(12)))},
            {"bad_words": ["return", "self", "the"]},
        ]
        return {**self._short(), "max_tokens": self._max_tokens, **self._rng.choice(settings)}

    def _logprobs(self) -> dict[str, Any]:
        more = {"prompt_logprobs": 1} if self._rng.random() < 0.3 else {}
        return {**self._short(), "logprobs": self._rng.choice([0, 1, 5]), **more}

    def _token_logprobs(self) -> dict[str, Any]:
        token_ids = sorted(set(self._text(self._rng.choice([1, 9, 90]))))
        return {**self._short(), "logprobs": 1, "logprob_token_ids": token_ids}

    def _biases(self) -> dict[str, Any]:
        biases = {str(token_id): self._rng.uniform(-9, 9) for token_id in self._text(20)}
        penalty = self._rng.choice([1.0, 1.3])
        return {**self._short(), "logit_bias": biases, "repetition_penalty": penalty}

    def _tiny_prompt(self) -> dict[str, Any]:
        return {"prompt": self._text(self._rng.randint(1, 2)), "max_tokens": self._length()}

    def _grammar(self) -> dict[str, Any]:
        # All but the last end, and go on after EOS, which drafts may have inside.
        grammars: list[dict[str, Any]] = [
            {"regex": "[a-d]{1,3}"},
            {"choice": ["yes", "no", "yesterday"]},
            {"json": {"type": "object", "properties": {}, "additionalProperties": False}},
            {"regex": r"[\s\S]*"},
        ]
        return {
            **self._short(),
            "max_tokens": self._max_tokens,
            "ignore_eos": self._rng.random() < 0.7,
            "structured_outputs": self._rng.choice(grammars),
        }

    def _allowed_tokens(self) -> dict[str, Any]:
        return {**self._short(), "allowed_token_ids": sorted(set(self._text(40)))}

    def _forced_length(self) -> dict[str, Any]:
        length = self._length()
        return {**self._short(), "max_tokens": length, "min_tokens": length}
