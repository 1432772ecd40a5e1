"""The hook that has vLLM set its LoRA metadata without waiting for the GPU; one of `vllm_fixes`."""

from __future__ import annotations

import bisect
import functools
from typing import TYPE_CHECKING, Any

from layerskip_vllm.hooks import install

if TYPE_CHECKING:
    import numpy as np

LORA_FIXES: list[install.Hook] = []

_fix = functools.partial(install.hook, LORA_FIXES)


@_fix(
    target="vllm.lora.punica_wrapper.punica_gpu:PunicaWrapperGPU.update_metadata",
    relies_on=(
        "vllm.lora.ops.triton_ops.lora_kernel_metadata:LoRAKernelMeta",
        "vllm.lora.punica_wrapper.utils:convert_mapping",
        "vllm.utils.torch_utils:async_tensor_h2d",
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

        self.is_prefill = mapping.is_prefill
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id)} | {0: -1}
        for meta, ids in (
            (self.token_mapping_meta, mapping.index_mapping),
            (self.prompt_mapping_meta, mapping.prompt_mapping),
        ):
            set_kernel_metadata(meta, np.array([slot_of[i] for i in ids], np.int32))

    return update_metadata


def set_kernel_metadata(meta: Any, slots: np.ndarray) -> None:
    """Set what vLLM's LoRA kernels read, from the host.

    Differs from `LoRAKernelMeta.prepare_tensors`, which asks the device what the host knows, and
    waits for the answer.

    Args:
        meta: vLLM's `LoRAKernelMeta`; its buffers are written.
        slots: `[num_rows] int32`, the slot of each row's adapter, -1 for none.
    """
    import numpy as np
    from vllm.utils.torch_utils import async_tensor_h2d

    ids, counts = np.unique(slots, return_counts=True)
    is_without = bool((ids == -1).all())
    if is_without:
        ids, counts = ids[:0], counts[:0]
    active = np.full(len(meta.active_lora_ids), -1, np.int32)
    active[: len(ids)] = ids
    num_rows = np.zeros(len(meta.num_tokens_per_lora), np.int32)
    num_rows[: len(ids)] = counts
    starts = np.zeros(len(meta.lora_token_start_loc), np.int32)
    starts[1 : len(ids) + 1] = counts.cumsum()
    async_tensor_h2d(active, out=meta.active_lora_ids)
    async_tensor_h2d(num_rows, out=meta.num_tokens_per_lora)
    async_tensor_h2d(starts, out=meta.lora_token_start_loc)
    meta.no_lora_flag_cpu[0] = is_without
    captured = meta.captured_lora_counts
    case = bisect.bisect_left(captured, len(ids))
    is_captured = len(ids) > 0 and case < len(captured)
    meta.num_active_loras_cpu[0] = captured[case] if is_captured else len(ids)
    if is_without:
        return
    order = slots.argsort(kind="stable").astype(np.int32)
    async_tensor_h2d(slots, out=meta.token_lora_mapping[: len(slots)])
    async_tensor_h2d(order, out=meta.token_indices_sorted_by_lora_ids[: len(slots)])
