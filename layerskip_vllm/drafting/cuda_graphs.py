"""The CUDA graphs of draft steps on Model Runner V2; captured and run by `speculator`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CreateForwardFn,
    CudaGraphManager,
)
from vllm.v1.worker.gpu.lora_utils import create_lora_capture_hook, get_lora_capture_cases
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
)

from layerskip_vllm.config.speculative import get_layerskip_config
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
    """vLLM's graphs of draft steps, with those of a single step where K depends on the batch.

    Differs from its base, whose first draft step belongs to another graph, so that it never
    captures a draft of one token, and whose drafts have no adapters.
    """

    _capture_descs: dict[CUDAGraphMode, list[BatchExecutionDescriptor]]

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

    @override
    def capture(self, *args: Any, specialize_spec_tokens: bool = False, **kwargs: Any) -> None:
        if specialize_spec_tokens:
            config = get_layerskip_config(self.vllm_config)
            schedule = build_dynamic_sd_schedule_lookup(
                config.num_speculative_tokens_per_batch_size,
                vllm_max_batch_size=self.max_num_reqs,
                vllm_num_speculative_tokens=config.num_speculative_tokens,
            )
            self._capture_descs = {
                mode: [
                    SpeculatorBatchDescriptor(**vars(desc), num_speculative_tokens=k)
                    for desc in descs
                    for k in sorted(set(schedule) - {0}, reverse=True)
                ]
                for mode, descs in self._capture_descs.items()
            }
        super().capture(*args, **kwargs)
