"""The hooks that make layerskip a speculative method of vLLM, one place each.

`plugin` installs them. Where vLLM has a registry of methods (`patches/vllm-*.diff`),
`register_method` gives it the same functions and classes in their stead.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from layerskip_vllm.config.flags import METHOD, add_speculative_flags, fold_settings, is_layerskip
from layerskip_vllm.hooks import install

if TYPE_CHECKING:
    import argparse

    import torch
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.outputs import ModelRunnerOutput

REGISTRY = "vllm.v1.spec_decode.registry"
# What of a registry the plugin needs; another registry may have the same name.
NEEDED_OF_REGISTRY = f"{REGISTRY}:SpeculativeMethodSpec.create_config"
METHOD_HOOKS: list[install.Hook] = []

_hook = functools.partial(install.hook, METHOD_HOOKS)

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_PARAMS = "vllm.sampling_params:SamplingParams"
_METRICS = "vllm.v1.metrics.loggers:PrometheusStatLogger"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V1_DRAFT = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
_LORA_MIXIN = "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"


@_hook(
    target=f"{_ARGS}.create_speculative_config",
    why='`{"method": "layerskip"}` and `{"model": "layerskip"}` make a `LayerSkipConfig`',
    reason="vLLM's `SpeculativeConfig` takes its methods from a closed list and looks for a draft "
    "checkpoint.",
    process="whichever reads the engine arguments: the API server, the one that makes an `LLM`, a "
    "Ray actor",
    upstream="[vllm#36219](https://github.com/vllm-project/vllm/issues/36219), open",
    remove_when="speculative methods can be registered; `create_config` of the registry in the "
    "diff",
)
def _create_speculative_config(original: Any) -> Any:
    """Wrap it: arguments that do not name layerskip go to the original unchanged."""

    @functools.wraps(original)
    def create_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        create = original
        if is_layerskip(self):
            from layerskip_vllm.config.speculative import create_layerskip_config

            create = create_layerskip_config
        config: SpeculativeConfig | None = create(self, target_model_config, target_parallel_config)
        return config

    return create_speculative_config


@_hook(
    target=f"{_ARGS}.add_cli_args",
    why="the flags `--speculative-model`, `--num-speculative-tokens` and layerskip's own",
    reason="Those are `--spec-exit-layer`, `--spec-exit-adapter`, `--spec-draft-vocab` and "
    "`--spec-lookup`; and `layerskip` is among the choices of `--spec-method`.",
    process="the one that parses the command line",
    upstream="none; vLLM lets plugins extend its parser only by platform",
    remove_when="a registered method can bring flags; `add_cli_args` of the registry in the diff",
)
def _add_cli_args(original: Any) -> Any:
    """Wrap it: the original fills the parser, then the flags are added."""
    function = original.__func__

    @functools.wraps(function)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_speculative_flags(function(parser))

    return staticmethod(add_cli_args)


@_hook(
    target=f"{_ARGS}.from_cli_args",
    why="layerskip's own flags reach the speculative config",
    reason="`EngineArgs` has no fields for them.",
    process="the one that parses the command line",
    remove_when="a registered method can bring flags; `fold_cli_args` of the registry in the diff",
)
def _from_cli_args(original: Any) -> Any:
    """Wrap it: move the flags' values into `speculative_config`, then call the original."""
    function = original.__func__

    @functools.wraps(function)
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> Any:
        return function(cls, fold_settings(args))

    return classmethod(from_cli_args)


@_hook(
    target=f"{_PARAMS}.verify",
    why="a request's layerskip arguments are checked where it enters",
    reason='A request may say how many tokens it drafts, `extra_args={"layerskip": '
    '{"num_speculative_tokens": ...}}`; a wrong value is refused before the engine sees it.',
    process="the API server's, or that of `LLM`",
    upstream="none; vLLM lets logits processors check `extra_args`, nobody else",
    remove_when="a registered method can check requests; `check_request` of the registry in the "
    "diff",
)
def _verify(original: Any) -> Any:
    """Wrap it: the original's checks, then those of requests with such an argument."""

    @functools.wraps(original)
    def verify(
        self: SamplingParams,
        model_config: ModelConfig,
        speculative_config: SpeculativeConfig | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        from layerskip_vllm.config.request import check_request

        original(self, model_config, speculative_config, *args, **kwargs)
        check_request(self, speculative_config)

    return verify


@_hook(
    target=f"{_METRICS}.log_engine_initialized",
    relies_on=(f"{_METRICS}._gauge_cls", f"{_METRICS}.engine_indexes"),
    why="`vllm:layerskip_info` says E, K and where each comes from in a server's metrics",
    reason="The entry points of `vllm.stat_logger_plugins` would do, but one that is installed "
    "turns statistics on for every server, also with `--disable-log-stats`, and costs a call a "
    "step.",
    process="each API server, and that of an `LLM` that keeps statistics",
    upstream="none; vLLM publishes the settings of its KV cache alone",
    remove_when="a registered method can publish metrics; `publish_info` of the registry in the "
    "diff",
)
def _log_engine_initialized(original: Any) -> Any:
    """Wrap it: where layerskip drafts, one more gauge after the original's."""

    @functools.wraps(original)
    def log_engine_initialized(self: PrometheusStatLogger) -> None:
        original(self)
        if _is_config(self.vllm_config.speculative_config):
            from layerskip_vllm.config.info_metric import publish_info

            publish_info(self)

    return log_engine_initialized


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
        if _is_config(self.vllm_config.speculative_config):
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
        if _is_config(self.vllm_config.speculative_config):
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
        if _is_config(self.vllm_config.speculative_config):
            from layerskip_vllm.drafting.auto_length import observe_step

            observe_step(self, scheduler_output, model_runner_output)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output


@_hook(
    target=f"{_V1_DRAFT}.__new__",
    is_new=True,
    relies_on=(
        f"{_V1_DRAFT}.__init__",
        f"{_V1_RUNNER}.propose_draft_token_ids",
        f"{_V1_RUNNER}._input_fits_in_drafter",
    ),
    why="Model Runner V1 drafts with a `LayerSkipProposer`",
    reason="The runner picks its drafter from a fixed list, and asks `isinstance(drafter, "
    "DraftModelProposer)` later on.",
    process=install.V1_WORKER,
    upstream="[vllm#37399](https://github.com/vllm-project/vllm/pull/37399), closed: V1 is "
    "deprecated",
    remove_when="vLLM drops Model Runner V1, or with `proposer_cls` of the registry in the diff",
)
def _new_proposer(original: None) -> Any:
    """Add the method: with a `LayerSkipConfig`, `DraftModelProposer(...)` makes the subclass.

    In all other cases it makes what it would have made.
    """

    def __new__(cls: type, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.spec_decode.draft_model import DraftModelProposer

        if cls is DraftModelProposer and _is_config(vllm_config.speculative_config):
            from layerskip_vllm.drafting.proposer import LayerSkipProposer

            cls = LayerSkipProposer
        return object.__new__(cls)

    return staticmethod(__new__)


@_hook(
    target="vllm.v1.worker.gpu.model_runner:init_speculator",
    defined_in="vllm.v1.worker.gpu.spec_decode",
    relies_on=(f"{_V2_RUNNER}.initialize_kv_cache",),
    why="Model Runner V2 drafts with a `LayerSkipSpeculator`",
    reason="Its drafters are a fixed list too. `GPUModelRunner.initialize_kv_cache` keeps draft "
    "layers out of the target's checks.",
    process=install.V2_WORKER,
    upstream="[vllm#36219](https://github.com/vllm-project/vllm/issues/36219), open",
    remove_when="V2 takes drafters from a registry; `speculator_cls` of the one in the diff",
)
def _init_speculator(original: Any) -> Any:
    """Wrap the name that the runner's module imported, which is the one it calls.

    Any other configuration goes to the original unchanged.
    """

    @functools.wraps(original)
    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        if _is_config(vllm_config.speculative_config):
            from layerskip_vllm.drafting.speculator import LayerSkipSpeculator

            return LayerSkipSpeculator(vllm_config, device, req_states)
        return original(vllm_config, device, req_states)

    return init_speculator


@_hook(
    target=f"{_V2_RUNNER}.initialize_kv_cache",
    relies_on=(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates",
        "vllm.v1.worker.gpu.attn_utils:get_varlen_cudagraph_unsupported_backend",
        f"{_V2_RUNNER}.execute_model",
    ),
    why="on Model Runner V2, steps in which requests draft less than K stay in full CUDA graphs",
    reason="vLLM captures them for K + 1 tokens a request. Graphs for any mix of tokens it "
    "captures for adaptive verification alone.",
    process=install.V2_WORKER,
    upstream="not reported yet",
    remove_when="vLLM captures them wherever the attention backend can; without this such steps "
    "run in piecewise graphs; `BaseSpeculator.prepare_target_graphs` in the diff",
)
def _initialize_kv_cache(original: Any) -> Any:
    """Wrap it: with a `LayerSkipConfig`, choose the target's graphs anew after the original.

    They are captured later on.
    """

    @functools.wraps(original)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _is_config(self.speculative_config):
            self.speculator.prepare_target_graphs(self)

    return initialize_kv_cache


@_hook(
    target=f"{_V2_RUNNER}.sample",
    relies_on=(
        "vllm.v1.worker.gpu.lora_utils:LoraState",
        "vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping",
    ),
    why="on Model Runner V2, an adapter of the head is in all rows that are verified",
    reason="vLLM maps one row of logits a request to its LoRA adapter, but verifies K + 1 rows a "
    "request. An adapter of the head is then missing in the other rows, or another request's is in "
    "them; on a CPU the shapes do not fit and the engine ends. Every speculative method on V2 has "
    "this; the hook serves layerskip alone, whose drafter takes the requests' adapters from here.",
    process=install.V2_WORKER,
    upstream="not reported yet",
    remove_when="V2 maps as many rows as it verifies, as V1 does, and gives drafters its LoRA "
    "state; `BaseSpeculator.prepare_sampling` in the diff",
)
def _sample(original: Any) -> Any:
    """Wrap it: map each row that is about to be verified, then call the original.

    `LoRAModelManager.set_adapter_mapping` leaves out a mapping that it was given last. Other
    configurations go to the original unchanged.
    """

    @functools.wraps(original)
    def sample(self: Any, hidden_states: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_config(self.speculative_config):
            self.speculator.prepare_sampling(self.lora_state, input_batch)
        return original(self, hidden_states, input_batch, *args, **kwargs)

    return sample


@_hook(
    target=f"{_LORA_MIXIN}.reset_lora_state",
    relies_on=(
        f"{_V1_RUNNER}.reload_weights",
        f"{_V2_RUNNER}.reload_weights",
        "vllm.v1.worker.gpu_worker:Worker.finish_weight_update",
    ),
    why="a draft head of few rows follows the target's weights",
    reason="Its rows are copies. This is what both runners call whenever base weights were "
    "replaced, however they came: reloaded, transferred, or written in place.",
    process="each worker",
    upstream="none; vLLM tells its adapters alone",
    remove_when="vLLM tells drafters that weights have changed; `after_weights_change` of the "
    "registry in the diff",
)
def _reset_lora_state(original: Any) -> Any:
    """Wrap it: the original, then the drafter is told."""

    @functools.wraps(original)
    def reset_lora_state(self: Any) -> None:
        original(self)
        if _is_config(self.speculative_config):
            _after_weights_change(self)

    return reset_lora_state


def _is_config(config: SpeculativeConfig | None) -> bool:
    from layerskip_vllm.config.speculative import LayerSkipConfig

    return isinstance(config, LayerSkipConfig)


def register_method() -> None:
    """Give vLLM's registry of speculative methods, where there is one, what the hooks call."""
    from layerskip_vllm.config.info_metric import publish_info
    from layerskip_vllm.config.request import check_request
    from layerskip_vllm.config.speculative import create_layerskip_config
    from layerskip_vllm.drafting.auto_length import observe_step
    from layerskip_vllm.drafting.request_limits import limit_drafts, limit_step

    registry = importlib.import_module(REGISTRY)
    registry.register_speculative_method(
        METHOD,
        registry.SpeculativeMethodSpec(
            speculator_cls="layerskip_vllm.drafting.speculator:LayerSkipSpeculator",
            proposer_cls="layerskip_vllm.drafting.proposer:LayerSkipProposer",
            create_config=create_layerskip_config,
            add_cli_args=add_speculative_flags,
            fold_cli_args=fold_settings,
            check_request=check_request,
            publish_info=publish_info,
            before_schedule=limit_drafts,
            after_schedule=limit_step,
            after_step=observe_step,
            after_weights_change=_after_weights_change,
        ),
    )


def _after_weights_change(runner: Any) -> None:
    runner.get_draft_model().expect_weights()
