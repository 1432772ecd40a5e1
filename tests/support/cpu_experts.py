"""Expert parallelism on the CPU, for which vLLM 0.32.0 lacks two things.

Its expert kernel ignores the `expert_map` that it is given: a rank looks up experts that it does
not have, and crashes. Its communicator has no collectives of different lengths, with which ranks
under data parallelism exchange tokens (https://github.com/vllm-project/vllm/issues/57837). Plain
vLLM fails alike. This adds both in PyTorch, for tests; called in the worker.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

# Whether this process has run experts of which it holds a part.
has_run_a_part = False


def add_expert_parallelism() -> None:
    """Add what is missing to vLLM's classes in this process."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    CPUUnquantizedExperts.apply = _with_local_experts(CPUUnquantizedExperts.apply)
    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv


def _with_local_experts(original: Any) -> Any:
    @functools.wraps(original)
    def apply(self: Any, *args: Any, **kwargs: Any) -> None:
        expert_map = kwargs["expert_map"]
        if expert_map is not None:
            global has_run_a_part
            has_run_a_part = has_run_a_part or bool((expert_map < 0).any())
            local_ids = expert_map[kwargs["topk_ids"].long()]  # [num_tokens, top_k], -1: elsewhere
            kwargs["topk_weights"] = kwargs["topk_weights"].masked_fill(local_ids < 0, 0.0)
            kwargs["topk_ids"] = local_ids.clamp(min=0).to(kwargs["topk_ids"].dtype)
        original(self, *args, **kwargs)

    return apply


def _all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Concatenate the ranks' tensors, of which rank i's has `sizes[i]` rows."""
    assert dim == 0
    if isinstance(input_, list):
        return [_all_gatherv(self, tensor, dim, sizes) for tensor in input_]
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded, group=self.cpu_group)
    return torch.cat([tensor[:size] for tensor, size in zip(gathered, sizes, strict=True)])


def _reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """Add the ranks' tensors up, and keep this rank's `sizes[rank]` rows."""
    assert dim == 0
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.cpu_group)
    return total.split(sizes)[self.rank_in_group].clone()
