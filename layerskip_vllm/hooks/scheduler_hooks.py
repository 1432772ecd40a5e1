"""The hooks of the method in the scheduler: how much each request and each step drafts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from layerskip_vllm.config.flags import is_layerskip_config
from layerskip_vllm.hooks import install

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput

SCHEDULER_HOOKS: list[install.Hook] = []

_hook = functools.partial(install.hook, SCHEDULER_HOOKS)

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"


@_hook(
    target=f"{_SCHEDULER}.schedule",
    relies_on=(
        f"{_SCHEDULER}.dynamic_sd_lookup",
        f"{_SCHEDULER}.max_num_running_reqs",
        f"{_SCHEDULER}.update_draft_token_ids",
        f"{_SCHEDULER}.update_draft_token_ids_in_output",
    ),
    why="a request has no more drafts verified than it asks for, and none that nothing drafted",
    reason="The scheduler alone sets that number, for both model runners, and with asynchronous "
    "scheduling too, where it deals in placeholders. A request with one token left to compute "
    "would get K of them, which are refused, but draw from its seed and exceed "
    "`long_prefill_token_threshold`.",
    process="the engine core",
    remove_when="vLLM has a K for each request, or with `before_schedule` of the registry in the "
    "diff",
)
def _schedule(original: Any) -> Any:
    """Wrap it: with a `LayerSkipConfig`, cut each running request's `spec_token_ids` first.

    The original then reserves neither tokens nor blocks for what was cut. It gives no placeholders
    where K depends on the batch size, which it always does then: `dynamic_sd_lookup` is set.
    """

    @functools.wraps(original)
    def schedule(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        if is_layerskip_config(self.vllm_config.speculative_config):
            from layerskip_vllm.drafting.request_limits import limit_drafts

            limit_drafts(self)
        return original(self, *args, **kwargs)

    return schedule


@_hook(
    target=f"{_SCHEDULER}._update_after_schedule",
    relies_on=(f"{_ASYNC_SCHEDULER}._update_after_schedule",),
    why="a step drafts no more tokens than its requests ask for",
    reason="And none if none does.",
    process="the engine core",
    remove_when="vLLM has a K for each request, or with `after_schedule` of the registry in the "
    "diff",
)
def _update_after_schedule(original: Any) -> Any:
    """Wrap it: with a `LayerSkipConfig`, lower `num_spec_tokens_to_schedule` before the original.

    Not with data parallelism, whose ranks must draft alike. `AsyncScheduler` calls this before it
    reads that number.
    """

    @functools.wraps(original)
    def _update_after_schedule(self: Scheduler, scheduler_output: SchedulerOutput) -> None:
        if is_layerskip_config(self.vllm_config.speculative_config):
            from layerskip_vllm.drafting.request_limits import limit_step

            limit_step(self, scheduler_output)
        original(self, scheduler_output)

    return _update_after_schedule


@_hook(
    target=f"{_SCHEDULER}.update_from_output",
    why='with K "auto", what steps take and which drafts are accepted says how many pay',
    reason="All of it passes here: a step that has ended, what it verified and what it sampled.",
    process="the engine core",
    remove_when="vLLM chooses K by acceptance and cost, or with `after_step` of the registry in "
    "the diff",
)
def _update_from_output(original: Any) -> Any:
    """Wrap it: where K is "auto", learn from the step before its tokens are taken in."""

    @functools.wraps(original)
    def update_from_output(
        self: Scheduler, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        if is_layerskip_config(self.vllm_config.speculative_config):
            from layerskip_vllm.drafting.auto_length import observe_step

            observe_step(self, scheduler_output, model_runner_output)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output
