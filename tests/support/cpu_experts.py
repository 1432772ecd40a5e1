"""Expert parallelism on the CPU, where vLLM's kernel has none.

`CPUUnquantizedExperts.apply` ignores the `expert_map` it is given: a rank looks up experts that
it does not have, and crashes (vLLM 0.32.0, with speculation or without). This maps them, as other
kernels of vLLM do. For tests; called in the worker.
"""

from __future__ import annotations

import functools
from typing import Any


def route_to_local_experts() -> None:
    """Let each rank of this process's engines compute its own experts and no others."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply

    @functools.wraps(original)
    def apply(self: Any, *args: Any, **kwargs: Any) -> None:
        expert_map = kwargs["expert_map"]
        if expert_map is not None:
            local_ids = expert_map[kwargs["topk_ids"].long()]  # [num_tokens, top_k], -1: elsewhere
            kwargs["topk_weights"] = kwargs["topk_weights"].masked_fill(local_ids < 0, 0.0)
            kwargs["topk_ids"] = local_ids.clamp(min=0).to(kwargs["topk_ids"].dtype)
        original(self, *args, **kwargs)

    CPUUnquantizedExperts.apply = apply
