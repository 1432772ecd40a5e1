"""Requests held to as many drafts as they ask for; called around each step of the scheduler.

In the engine core: the scheduler alone decides how many of a request's drafts are verified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerskip_vllm.config.request import max_num_drafts

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler


def limit_drafts(scheduler: Scheduler) -> None:
    """Cut the drafts that requests take into the next step, before it is scheduled.

    With asynchronous scheduling they are placeholders, whose number is what counts.

    Args:
        scheduler: The scheduler, whose running requests are cut.
    """
    for request in scheduler.running:
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
