"""What one request may ask for: `SamplingParams.extra_args["layerskip"]`, how much it drafts.

Checked where a request enters (the API server's process, or that of `LLM`), obeyed in the engine
core by `drafting/request_limits.py`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeGuard

from vllm.exceptions import VLLMValidationError

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig
    from vllm.sampling_params import SamplingParams

KEY = "layerskip"
FIELD = "num_speculative_tokens"
_NAME = f"extra_args[{KEY!r}]"


class RequestError(VLLMValidationError, ValueError):
    """What a request asks for is wrong; the server answers with 400, as to no other ValueError."""


def check_request(params: SamplingParams, speculative_config: SpeculativeConfig | None) -> None:
    """Refuse a request that asks for what this engine cannot draft.

    `RequestError` if its entry for layerskip is of the wrong form, out of range, or given to an
    engine that does not draft with layerskip.
    """
    extra_args = params.extra_args or {}
    if KEY not in extra_args:
        return
    from layerskip_vllm.config.speculative import LayerSkipConfig

    given = extra_args[KEY]
    if not isinstance(speculative_config, LayerSkipConfig):
        raise RequestError(
            f"{_NAME} is {given!r}, but this engine does not draft with layerskip; leave it out, "
            "or start the engine with speculative_config={'method': 'layerskip'}."
        )
    entry = _read_entry(given)
    if not isinstance(entry, dict):
        raise RequestError(
            f"{_NAME} is {given!r}; it must be a dict such as {{{FIELD!r}: 2}}, or a string with "
            "that as JSON (the server's vllm_xargs takes no dicts)."
        )
    unknown = sorted(entry.keys() - {FIELD}, key=str)
    if unknown:
        raise RequestError(f"{_NAME} has {unknown[0]!r}; {FIELD!r} is all that it can have.")
    limit = speculative_config.num_speculative_tokens
    value = entry.get(FIELD, limit)
    if not _is_count(value) or value > limit:
        raise RequestError(
            f"{_NAME}[{FIELD!r}] is {value!r}; it must be an integer from 0, which turns drafting "
            f"off, to {limit}, the engine's {FIELD}."
        )


def max_num_drafts(params: SamplingParams | None) -> int | None:
    """Read how many tokens a request drafts at most, None if it does not say.

    One that is of the wrong form says nothing: a client that adds requests to the engine core
    itself gets it past all checks, and a step must not fail for all the requests that it schedules.
    """
    if params is None or not params.extra_args or KEY not in params.extra_args:
        return None
    entry = _read_entry(params.extra_args[KEY])
    num_drafts = entry.get(FIELD) if isinstance(entry, dict) else None
    return num_drafts if _is_count(num_drafts) else None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_entry(given: Any) -> Any:
    return _read_json(given) if isinstance(given, str) else given


@lru_cache(maxsize=256)
def _read_json(text: str) -> Any:
    """Return what a string holds as JSON; the string itself if that is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
