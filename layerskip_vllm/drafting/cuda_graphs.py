"""The CUDA graphs on Model Runner V2 of draft steps, and of a verification that begins at the exit.

Captured and run by `speculator` and `device_verifier`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CreateForwardFn,
    CudaGraphManager,
    ModelCudaGraphManager,
)
from vllm.v1.worker.gpu.lora_utils import create_lora_capture_hook, get_lora_capture_cases
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from layerskip_vllm.drafting.lora import DraftLoRA


class _CudaGraphsWithLoRA(CudaGraphManager):
    """vLLM's graphs, each captured with as many adapters in use as it will be run with."""

    select_dummy_loras: Callable[[int, int, int], None] | None

    @override
    def capture(self, create_forward_fn: CreateForwardFn, *args: Any, **kwargs: Any) -> None:
        select = self.select_dummy_loras

        def create(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            if select is not None:
                select(desc.num_active_loras, desc.num_reqs or desc.num_tokens, desc.num_tokens)
            return create_forward_fn(desc, warmup)

        super().capture(create, *args, **kwargs)


class DraftCudaGraphs(SpeculatorCudaGraphManager, _CudaGraphsWithLoRA):
    """vLLM's graphs of draft steps, one of a step for each batch size, replayed K times.

    Differs from its base, whose drafts have no adapters.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        lora: DraftLoRA | None,
    ):
        lora_config = vllm_config.lora_config
        super().__init__(
            vllm_config,
            device,
            cudagraph_mode,
            decode_query_len=1,
            lora_capture_cases=get_lora_capture_cases(lora_config, vllm_config.compilation_config),
        )
        self.select_dummy_loras = create_lora_capture_hook(lora_config, lora)

    def leave_out_below(self, num_tokens: int) -> None:
        """Capture no graphs of fewer tokens, with which none of them will be run."""
        for mode, descs in self._capture_descs.items():
            self._capture_descs[mode] = [desc for desc in descs if desc.num_tokens >= num_tokens]


class RemainingLayersCudaGraphs(ModelCudaGraphManager):
    """Graphs of the layers after the exit, for steps that the target has full graphs for.

    They share the target's buffers and the metadata of its step, which are of its graph's size.
    """

    def __init__(self, target_graphs: ModelCudaGraphManager, min_num_tokens: int):
        """Choose the graphs that will be captured.

        Args:
            target_graphs: The target's, chosen already.
            min_num_tokens: What a step must have for them to be used.
        """
        descs = [
            desc
            for desc in target_graphs._capture_descs.get(CUDAGraphMode.FULL, [])
            if min_num_tokens
            <= desc.num_tokens
            <= target_graphs.max_num_reqs * target_graphs.decode_query_len
        ]
        super().__init__(
            target_graphs.vllm_config,
            target_graphs.device,
            CUDAGraphMode.FULL_DECODE_ONLY if descs else CUDAGraphMode.NONE,
            target_graphs.decode_query_len,
        )
        self._capture_descs = {CUDAGraphMode.FULL: descs}
