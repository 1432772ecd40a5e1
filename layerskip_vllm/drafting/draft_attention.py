"""The attention metadata of passes through the first layers, on Model Runner V1.

Made by `proposer` in the worker; on V2 vLLM's own builders make it in the draft's CUDA graph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.worker.utils import AttentionGroup

from layerskip_vllm.drafting.slots import DraftSlots

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def group_layers(
    vllm_config: VllmConfig,
    device: torch.device,
    layer_names: Collection[str],
    kv_cache_config: KVCacheConfig,
    kernel_block_sizes: Sequence[int],
) -> list[AttentionGroup]:
    """Group attention layers by KV cache group and backend, with builders of their metadata.

    They may lie in several KV cache groups (sliding windows).

    Args:
        vllm_config: The engine's.
        device: Where they run.
        layer_names: The layers.
        kv_cache_config: All KV cache groups.
        kernel_block_sizes: Tokens of a block that the kernels see, by KV cache group, if known.

    Returns:
        The groups.
    """
    layers = get_layers_from_vllm_config(
        vllm_config,
        AttentionLayerBase,  # type: ignore[type-abstract]  # finds instances, makes none
        list(layer_names),
    )
    groups: dict[Any, AttentionGroup] = {}
    for group_id, kv_cache_group in enumerate(kv_cache_config.kv_cache_groups):
        for name in kv_cache_group.layer_names:
            if name not in layers:
                continue
            spec = kv_cache_group.kv_cache_spec
            if isinstance(spec, UniformTypeKVCacheSpecs):
                spec = spec.kv_cache_specs[name]
            backend = layers[name].get_attn_backend()
            key = (group_id, backend.full_cls_name(), spec)
            group = groups.setdefault(key, AttentionGroup(backend, [], spec, group_id))
            group.layer_names.append(name)
    for group in groups.values():
        gid = group.kv_cache_group_id
        is_known = gid < len(kernel_block_sizes)
        group.create_metadata_builders(
            vllm_config,
            device,
            kernel_block_size=kernel_block_sizes[gid] if is_known else None,
        )
    return list(groups.values())


def one_token_a_request(
    target: CommonAttentionMetadata, arange: torch.Tensor
) -> CommonAttentionMetadata:
    """Make of the target step's metadata what all draft steps have in common.

    Args:
        target: That of the step that the target has just run.
        arange: `[more than num_reqs] int32`, on the device.

    Returns:
        Metadata to move on with `DraftAttention.build_step`.
    """
    num_reqs = target.batch_size()
    return replace(
        target,
        query_start_loc=arange[: num_reqs + 1],
        query_start_loc_cpu=torch.arange(num_reqs + 1, dtype=torch.int32),
        num_reqs=num_reqs,
        num_actual_tokens=num_reqs,
        max_query_len=1,
        is_prefilling=None,
        causal=True,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class DraftAttention:
    """Builds the first layers' attention metadata.

    Attributes:
        groups: The layers by KV cache group and backend.
    """

    groups: list[AttentionGroup]

    def __init__(self, groups: list[AttentionGroup], runner: GPUModelRunner, max_model_len: int):
        """Build for these groups, over the runner's block tables."""
        self.groups = groups
        self._runner = runner
        self._max_model_len = max_model_len

    def build_step(
        self, step: int, slots: DraftSlots, metadata: CommonAttentionMetadata
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Attention metadata and slot mapping of a draft step, by layer name.

        `metadata` is one object for all steps, moved on by a token in place: a copy for each step
        would take longer than what backends make of it.
        """
        metadata.seq_lens = slots.seq_lens[step]
        metadata.positions = slots.positions[step]
        metadata.max_seq_len = min(metadata.max_seq_len + 1, self._max_model_len)
        metadata._num_computed_tokens_cache = None
        upper_bound = metadata.seq_lens_cpu_upper_bound
        if upper_bound is not None:
            metadata.seq_lens_cpu_upper_bound = (upper_bound + 1).clamp_(max=self._max_model_len)
        slot_mappings = {gid: by_step[step] for gid, by_step in slots.slot_mappings.items()}
        return self.build(metadata, slot_mappings, step)

    def build(
        self,
        metadata: CommonAttentionMetadata,
        slot_mappings: dict[int, torch.Tensor],
        draft_index: int = 0,
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Attention metadata and slot mapping by layer name, of slots by KV cache group."""
        attn_metadata: dict[str, Any] = {}
        slot_mapping_by_layer: dict[str, torch.Tensor] = {}
        for group in self.groups:
            gid = group.kv_cache_group_id
            slot_mapping = slot_mappings[gid]
            metadata.slot_mapping = slot_mapping[: metadata.num_actual_tokens]
            block_table = self._runner.input_batch.block_table[gid]
            metadata.block_table_tensor = block_table.get_device_tensor(metadata.num_reqs)
            group_metadata = group.build_metadata_for_drafting(metadata, draft_index=draft_index)
            attn_metadata |= dict.fromkeys(group.layer_names, group_metadata)
            slot_mapping_by_layer |= dict.fromkeys(group.layer_names, slot_mapping)
        return attn_metadata, slot_mapping_by_layer
