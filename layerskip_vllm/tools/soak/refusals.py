"""Requests that a server must refuse, each with a 4xx status and a message, and no harm done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

# What is sent in the place of a JSON object of the right form.
MALFORMED_TEXTS: Mapping[str, bytes] = {
    "empty body": b"",
    "broken JSON": b'{"model": ',
    "JSON with a rest": b'{"prompt": "a"} }',
    "no object": b"[1, 2, 3]",
    "null": b"null",
    "a string": b'"prompt"',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "zero bytes": b"\x00" * 64,
}

# What a body that would be answered is changed by; more of it is in `wrong_layerskip_settings`.
WRONG_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "unknown model": {"model": "no-such-model"},
    "prompt is a number": {"prompt": 7},
    "prompt is an object": {"prompt": {"text": "a"}},
    "prompt of negative tokens": {"prompt": [-1]},
    "prompt of unknown tokens": {"prompt": [2**31]},
    "prompt of mixed types": {"prompt": ["a", 1]},
    "prompt is empty": {"prompt": []},
    "prompt is an empty text": {"prompt": ""},
    "max_tokens is text": {"max_tokens": "many"},
    "max_tokens is 0": {"max_tokens": 0},
    "max_tokens is negative": {"max_tokens": -1},
    "max_tokens is huge": {"max_tokens": 2**40},
    "temperature is text": {"temperature": "hot"},
    "temperature is no number": {"temperature": math.nan},
    "temperature is infinite": {"temperature": math.inf},
    "repetition_penalty is no number": {"repetition_penalty": math.nan},
    "temperature is negative": {"temperature": -0.1},
    "temperature is above 2": {"temperature": 2.1},
    "top_p is 0": {"top_p": 0},
    "top_p is above 1": {"top_p": 1.5},
    "top_k is -2": {"top_k": -2},
    "min_p is above 1": {"min_p": 1.5},
    "logit_bias outside the vocabulary": {"logit_bias": {str(2**31): 1}},
    "logprobs of tokens outside the vocabulary": {"logprobs": 1, "logprob_token_ids": [2**31]},
    "logprobs of too many tokens": {"logprobs": 1, "logprob_token_ids": [5] * 129},
    "grammar is broken": {"structured_outputs": {"regex": "["}},
    "n is 0": {"n": 0},
    "n is negative": {"n": -3},
    "n is huge": {"n": 10**9, "temperature": 1},
    "n is 2 and greedy": {"n": 2, "temperature": 0},
    "seed beyond 64 bits": {"seed": 2**64},
    "logprobs is negative": {"logprobs": -2},
    "logprobs is huge": {"logprobs": 10**6},
    "presence_penalty is 3": {"presence_penalty": 3},
    "frequency_penalty is -3": {"frequency_penalty": -3},
    "repetition_penalty is 0": {"repetition_penalty": 0},
    "stop is empty": {"stop": [""]},
    "stop is a number": {"stop": 5},
    "stop token outside the vocabulary": {"stop_token_ids": [2**31]},
    "stop token is text": {"stop_token_ids": ["a"]},
    "allowed_token_ids is empty": {"allowed_token_ids": []},
    "bad word is empty": {"bad_words": [""]},
    "min_tokens above max_tokens": {"min_tokens": 9, "max_tokens": 8},
    "stream is text": {"stream": "perhaps"},
    "stream_options without stream": {"stream_options": {"include_usage": True}},
    "vllm_xargs is a list": {"vllm_xargs": [1]},
}


def wrong_layerskip_settings(num_speculative_tokens: int) -> dict[str, dict[str, Any]]:
    """Name wrong values of a request's own setting of layerskip, each with its change of a body."""
    values: dict[str, Any] = {
        "K above the server's": json.dumps({"num_speculative_tokens": num_speculative_tokens + 1}),
        "K is negative": '{"num_speculative_tokens": -1}',
        "K is true": '{"num_speculative_tokens": true}',
        "K is a fraction": '{"num_speculative_tokens": 1.5}',
        "K is huge": json.dumps({"num_speculative_tokens": 2**70}),
        "K is null": '{"num_speculative_tokens": null}',
        "unknown key": '{"exit_layer": 1}',
        "no JSON": "off",
        "a number": 3,
        "a list": [1, 2],
        "deep JSON": "[" * 10_000,
    }
    return {
        f"layerskip: {name}": {"vllm_xargs": {"layerskip": value}} for name, value in values.items()
    }
