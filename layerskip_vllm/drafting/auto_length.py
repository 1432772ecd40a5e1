"""K "auto": vLLM's scheduler on one side, `DraftLengths`, which chooses, on the other.

In the engine core, which alone decides how many tokens a step drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from layerskip_vllm.checkpoint.weight_shares import estimate_shares
from layerskip_vllm.config.request import max_num_drafts
from layerskip_vllm.drafting.acceptance import DraftResult
from layerskip_vllm.drafting.draft_lengths import DraftLengths

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from layerskip_vllm.config.speculative import LayerSkipConfig

_lengths: WeakKeyDictionary[Scheduler, DraftLengths] = WeakKeyDictionary()


def choose_length(scheduler: Scheduler, limits: Mapping[str, int]) -> int:
    """Choose how many tokens the step that has just been scheduled is to draft.

    Args:
        scheduler: The step's.
        limits: The requests that will decode after it, and how many tokens each drafts at most.

    Returns:
        That number; all that the configuration allows where K is not "auto".
    """
    config = _config_of(scheduler)
    if not config.is_length_auto:
        return config.num_speculative_tokens
    lengths = _lengths.get(scheduler)
    if lengths is None:
        lengths = _lengths[scheduler] = DraftLengths(
            config.num_speculative_tokens, _share_of_draft(config)
        )
    return lengths.choose(limits)


def observe_step(
    scheduler: Scheduler, output: SchedulerOutput, model_output: ModelRunnerOutput
) -> None:
    """Learn from a step that has just ended; called before the scheduler takes in its tokens.

    Args:
        scheduler: The step's.
        output: The step, as it was scheduled.
        model_output: What it sampled: the drafts that were accepted, and one token more.
    """
    lengths = _lengths.get(scheduler)
    if lengths is None or not _config_of(scheduler).is_length_auto:
        return
    results, is_decode = {}, True
    sampled = model_output.sampled_token_ids
    for req_id, num_tokens in output.num_scheduled_tokens.items():
        num_drafts = len(output.scheduled_spec_decode_tokens.get(req_id, ()))
        is_decode &= num_tokens == 1 + num_drafts
        request = scheduler.requests.get(req_id)
        if request is None:
            continue  # aborted meanwhile
        num_sampled = len(sampled[model_output.req_id_to_index[req_id]]) if sampled else 0
        if num_sampled == 0:
            num_drafts = 0  # in the middle of its prompt
        elif request.use_structured_output and num_drafts < _num_drafted(lengths, request):
            num_drafts += 1  # what the grammar does not allow was left out, and is refused
        results[req_id] = DraftResult(num_drafts, max(0, min(num_drafts, num_sampled - 1)))
    lengths.observe(output.num_spec_tokens_to_schedule, results, is_decode)
    lengths.forget(output.finished_req_ids)


def _num_drafted(lengths: DraftLengths, request: Request) -> int:
    """Count what the step before has drafted for a request."""
    limit = max_num_drafts(request.sampling_params)
    return lengths.num_drafted if limit is None else min(limit, lengths.num_drafted)


def _config_of(scheduler: Scheduler) -> LayerSkipConfig:
    from layerskip_vllm.config.speculative import get_layerskip_config

    return get_layerskip_config(scheduler.vllm_config)


def _share_of_draft(config: LayerSkipConfig) -> float:
    """Estimate the least that a draft step takes, in steps of the target: what it reads."""
    model_config = config.target_model_config
    shares = estimate_shares(model_config, config.exit_layer)
    if shares is None:
        return config.exit_layer / model_config.get_total_num_hidden_layers()
    return shares.with_draft_vocab(config.draft_vocab_size / model_config.get_vocab_size()).total
