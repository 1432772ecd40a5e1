"""What makes layerskip a speculative method of vLLM: hooks, or vLLM's own registry of methods.

`plugin` installs the hooks. Where vLLM has a registry (`patches/vllm-*.diff`), `register_method`
gives it the same functions and classes in their stead.
"""

from __future__ import annotations

import importlib

from layerskip_vllm.config.flags import METHOD, add_speculative_flags, fold_settings
from layerskip_vllm.hooks import install
from layerskip_vllm.hooks.frontend_hooks import FRONTEND_HOOKS
from layerskip_vllm.hooks.runner_hooks import RUNNER_HOOKS, after_weights_change
from layerskip_vllm.hooks.scheduler_hooks import SCHEDULER_HOOKS

REGISTRY = "vllm.v1.spec_decode.registry"
# What of a registry the plugin needs; another registry may have the same name.
NEEDED_OF_REGISTRY = f"{REGISTRY}:SpeculativeMethodSpec.create_config"
METHOD_HOOKS: list[install.Hook] = [*FRONTEND_HOOKS, *SCHEDULER_HOOKS, *RUNNER_HOOKS]


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
            after_weights_change=after_weights_change,
        ),
    )
