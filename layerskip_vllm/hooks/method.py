"""What layerskip gives vLLM as a speculative method: called by the hooks, or by vLLM's registry.

Each imports its code when it is first called, never when it is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    import torch
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    from layerskip_vllm.config.speculative import LayerSkipConfig


def create_config(
    args: EngineArgs, model_config: ModelConfig, parallel_config: ParallelConfig
) -> LayerSkipConfig:
    """Read the engine arguments; see `config.create_layerskip_config`."""
    from layerskip_vllm.config.speculative import create_layerskip_config

    return create_layerskip_config(args, model_config, parallel_config)


def is_layerskip_config(config: SpeculativeConfig | None) -> bool:
    """Return whether a speculative config is layerskip's."""
    from layerskip_vllm.config.speculative import LayerSkipConfig

    return isinstance(config, LayerSkipConfig)


def create_proposer(vllm_config: VllmConfig, device: torch.device, runner: Any) -> Any:
    """Make the drafter of Model Runner V1."""
    from layerskip_vllm.drafting.proposer import LayerSkipProposer

    return LayerSkipProposer(vllm_config, device, runner)


def create_speculator(vllm_config: VllmConfig, device: torch.device) -> Any:
    """Make the drafter of Model Runner V2."""
    from layerskip_vllm.drafting.speculator import LayerSkipSpeculator

    return LayerSkipSpeculator(vllm_config, device)


def add_cli_args(parser: Any) -> Any:
    """Add layerskip's flags to vLLM's parser."""
    from layerskip_vllm.config.flags import add_speculative_flags

    return add_speculative_flags(parser)


def fold_cli_args(args: argparse.Namespace) -> argparse.Namespace:
    """Move the values of layerskip's flags to where vLLM carries them on."""
    from layerskip_vllm.config.flags import fold_settings

    return fold_settings(args)


def check_request(params: SamplingParams, speculative_config: SpeculativeConfig | None) -> None:
    """Refuse a request that layerskip cannot serve; see `request_args.check_request`."""
    from layerskip_vllm.config import request as request_args

    request_args.check_request(params, speculative_config)


def before_schedule(scheduler: Scheduler) -> None:
    """Cut the drafts that are to be scheduled to what each request asks for."""
    if is_layerskip_config(scheduler.vllm_config.speculative_config):
        from layerskip_vllm.drafting.request_limits import limit_drafts

        limit_drafts(scheduler.running)


def after_schedule(scheduler: Scheduler, output: SchedulerOutput) -> None:
    """Hold the step that has been scheduled to what its requests ask for."""
    if is_layerskip_config(scheduler.vllm_config.speculative_config):
        from layerskip_vllm.drafting.request_limits import limit_step

        limit_step(scheduler, output)
