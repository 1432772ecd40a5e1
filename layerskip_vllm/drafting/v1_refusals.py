"""What Model Runner V1 cannot draft with, known in the worker alone: its device, its scheduling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from layerskip_vllm.config.speculative import LayerSkipConfig


def check_runner_v1(config: LayerSkipConfig, device: torch.device, is_async: bool) -> None:
    """Refuse settings that Model Runner V1 does not have on this device."""
    _check_rejection_sampler(config.rejection_sample_method, device)
    reuse, lookup = config.reuse_exit_states, config.lookup
    if reuse != "off" and device.type != "cpu":
        raise ValueError(
            f"reuse_exit_states is {reuse!r}, but Model Runner V1 has it on CPUs alone; use "
            "Model Runner V2, or leave it out."
        )
    if lookup != "off" and (device.type != "cpu" or is_async):
        raise ValueError(
            f"lookup is {lookup!r}, but Model Runner V1 knows a request's tokens in time on "
            "the CPU alone, without async_scheduling; use 'off', or Model Runner V2 on a GPU."
        )


def _check_rejection_sampler(method: str, device: torch.device) -> None:
    reason = {
        "block": "Model Runner V1 has no block verification",
        "synthetic": "vLLM has no synthetic acceptance on the CPU",
    }.get(method)
    if method == "block" or (method == "synthetic" and device.type == "cpu"):
        raise ValueError(
            f"rejection_sample_method is {method!r}, but {reason}; use 'standard', or Model "
            "Runner V2 on a GPU."
        )
