"""The hook that has vLLM set its LoRA metadata without waiting for the GPU; one of `vllm_fixes`."""

from __future__ import annotations

import functools
from typing import Any

from layerskip_vllm.hooks import install

LORA_FIXES: list[install.Hook] = []


_fix = functools.partial(install.hook, LORA_FIXES)


@_fix(
    target="vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.update_metadata",
    relies_on=(
        "vllm.lora.ops.triton_ops.lora_kernel_metadata:LoRAKernelMeta",
        "vllm.lora.punica_wrapper.utils:convert_mapping",
    ),
    why="on a GPU, which row has which LoRA adapter is set without waiting for the device",
    reason="vLLM counts and sorts the rows on the device and waits for the result. Without drafts "
    "the rows change with the batch alone; with them they do three times a step, and the host "
    "could no longer work ahead.",
    process="each worker on a GPU",
    upstream="not reported yet; vLLM's code says that it should",
    remove_when="vLLM sets its LoRA metadata from the host",
)
def _update_metadata(original: Any) -> Any:
    """Replace it: the same, with what the kernels read counted and sorted on the host."""

    @functools.wraps(original)
    def update_metadata(
        self: Any,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **_: Any,
    ) -> None:
        import numpy as np

        from layerskip_vllm.drafting.lora import set_kernel_metadata

        self.is_prefill = mapping.is_prefill
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id)} | {0: -1}
        for meta, ids in (
            (self.token_mapping_meta, mapping.index_mapping),
            (self.prompt_mapping_meta, mapping.prompt_mapping),
        ):
            set_kernel_metadata(meta, np.array([slot_of[i] for i in ids], np.int32))

    return update_metadata
