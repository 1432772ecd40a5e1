"""Requests held to as many drafts as they ask for; called around each step of the scheduler.

In the engine core: the scheduler alone decides how many of a request's drafts are verified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerskip_vllm.config.request import max_num_drafts
from layerskip_vllm.drafting.auto_length import choose_length

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def limit_drafts(scheduler: Scheduler) -> None:
    """Cut the drafts that requests take into the next step, before it is scheduled.

    With asynchronous scheduling they are placeholders, whose number is what counts.

    Args:
        scheduler: The scheduler, whose running requests are cut.
    """
    _pad_no_request(scheduler)
    for request in scheduler.running:
        limit = max_num_drafts(request.sampling_params)
        if limit is not None and len(request.spec_token_ids) > limit:
            # Asynchronous scheduling shares one list between all requests.
            request.spec_token_ids = request.spec_token_ids[:limit]


def _pad_no_request(scheduler: Scheduler) -> None:
    """Have no request verify placeholders, which nothing has drafted, in its first step.

    vLLM gives K of them to a request that has one token left to compute (a prompt that is cached
    but for one, a prompt of one that joins others, a request that resumes), so that the step keeps
    its full CUDA graph. They are always refused, but verifying them draws from the request's seed,
    so that the answer to a cached prompt is another; they exceed a `long_prefill_token_threshold`
    of K or less, which ends the engine; they take room from a request that drafts less, or nothing;
    and each part of a model runner has to know them. vLLM leaves them out where K depends on the
    batch size. So K depends on it here, and is always the same; a step in which such a request
    joins others costs what one in which any prompt ends does.
    """
    if scheduler.dynamic_sd_lookup is None:
        num_sizes = scheduler.max_num_running_reqs + 1
        scheduler.dynamic_sd_lookup = [scheduler.num_spec_tokens] * num_sizes


def limit_step(scheduler: Scheduler, output: SchedulerOutput) -> None:
    """Have a step that has been scheduled draft as many tokens as its requests ask for, at most.

    That is what the one that takes the most does, or none at all; a request in the middle of its
    prompt takes none. Where K is "auto" it may be fewer, as many as pay.

    Args:
        scheduler: The scheduler of the step.
        output: The step; changed in place.
    """
    limits = {
        req_id: limit
        for req_id, num_tokens in output.num_scheduled_tokens.items()
        if (limit := _num_to_draft(scheduler, scheduler.requests[req_id], num_tokens)) is not None
    }
    longest = max(limits.values(), default=0)
    if limits:
        longest = min(longest, choose_length(scheduler, limits))
    # Data-parallel ranks must run as many draft steps as one another.
    if scheduler.parallel_config.data_parallel_size == 1:
        output.num_spec_tokens_to_schedule = min(output.num_spec_tokens_to_schedule, longest)
    if longest == 0 and hasattr(output, "skip_drafts"):
        output.skip_drafts = True  # since vLLM 0.33; data-parallel ranks agree on it


def _num_to_draft(scheduler: Scheduler, request: Request, num_scheduled_tokens: int) -> int | None:
    """Count how many tokens a request drafts at most, after a step that runs so many of its own.

    None in the middle of its prompt.
    """
    num_computed = request.num_computed_tokens + num_scheduled_tokens
    if num_computed < request.num_tokens + request.num_output_placeholders:
        return None
    limit = max_num_drafts(request.sampling_params)
    return scheduler.num_spec_tokens if limit is None else limit
