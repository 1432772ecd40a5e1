"""How many tokens one request drafts: `SamplingParams.extra_args["layerskip"]`.

Checked where a request enters (the API server's process, or that of `LLM`), obeyed by the scheduler
in the engine core: it alone decides how many of a request's drafts are verified.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

KEY = "layerskip"
FIELD = "num_speculative_tokens"
_NAME = f"extra_args[{KEY!r}]"


class RequestError(VLLMValidationError, ValueError):
    """What a request asks for is wrong; the server answers with 400, as to no other ValueError."""


def check_request(params: SamplingParams, speculative_config: SpeculativeConfig | None) -> None:
    """Refuse a request that asks for what this engine cannot draft.

    Args:
        params: The request's sampling parameters.
        speculative_config: The engine's.

    Raises:
        RequestError: If the request has an entry for layerskip that is of the wrong form, out of
            range, or given to an engine that does not draft with layerskip.
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
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise RequestError(
            f"{_NAME}[{FIELD!r}] is {value!r}; it must be an integer from 0, which turns drafting "
            f"off, to {limit}, the engine's {FIELD}."
        )


def max_num_drafts(params: SamplingParams | None) -> int | None:
    """Read how many tokens a request drafts at most.

    Args:
        params: Its sampling parameters, which `check_request` has seen.

    Returns:
        The number, None if it does not say.
    """
    if params is None or not params.extra_args or KEY not in params.extra_args:
        return None
    return _read_entry(params.extra_args[KEY]).get(FIELD)


def limit_drafts(requests: Iterable[Request]) -> None:
    """Cut the drafts that requests take into the next step, before it is scheduled.

    With asynchronous scheduling they are placeholders, whose number is what counts.

    Args:
        requests: The running requests.
    """
    for request in requests:
        limit = max_num_drafts(request.sampling_params)
        if limit is not None and len(request.spec_token_ids) > limit:
            # Asynchronous scheduling shares one list between all requests.
            request.spec_token_ids = request.spec_token_ids[:limit]


def limit_step(scheduler: Scheduler, output: SchedulerOutput) -> None:
    """Hold a step that has been scheduled, and is yet to be counted, to its requests' limits.

    vLLM pads a prompt that is cached but for one token with K placeholder drafts, whatever it asks
    for. And the step drafts no more tokens than the request that takes the most, or none at all;
    one CUDA graph of K steps runs them all the same.

    Args:
        scheduler: The scheduler of the step.
        output: The step; changed in place.
    """
    drafts = output.scheduled_spec_decode_tokens
    longest = 0
    for req_id in output.num_scheduled_tokens:
        limit = max_num_drafts(scheduler.requests[req_id].sampling_params)
        if limit is None:
            longest = scheduler.num_spec_tokens
            continue
        longest = max(longest, limit)
        num_cut = len(drafts.get(req_id, ())) - limit
        if num_cut > 0:
            output.num_scheduled_tokens[req_id] -= num_cut
            output.total_num_scheduled_tokens -= num_cut
            kept = drafts.pop(req_id)[:limit]
            if kept:
                drafts[req_id] = kept
    # Data-parallel ranks must run as many draft steps as one another. Where K depends on the batch
    # size, CUDA graphs are there for its values alone.
    is_alone = scheduler.parallel_config.data_parallel_size == 1
    if is_alone and (longest == 0 or scheduler.dynamic_sd_lookup is None):
        output.num_spec_tokens_to_schedule = min(output.num_spec_tokens_to_schedule, longest)


def _read_entry(given: Any) -> Any:
    return _read_json(given) if isinstance(given, str) else given


@lru_cache(maxsize=256)
def _read_json(text: str) -> Any:
    """What a string holds as JSON; the string itself if that is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
