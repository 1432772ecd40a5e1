"""Passes of the first layers over one token a request, on Model Runner V2: their attention, graphs.

`speculator` drafts with them in the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import override
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.utils import AttentionGroup

from layerskip_vllm.config.speculative import LayerSkipConfig
from layerskip_vllm.drafting.cuda_graphs import DraftCudaGraphs
from layerskip_vllm.drafting.exit_model import ExitModel


class OneTokenSteps(DraftModelSpeculator):
    """Runs the target's first layers on one token a request, over the target's own KV cache.

    What changes from step to step is on the device, in `input_buffers`, so that one CUDA graph of
    one step is replayed for each. Where the attention backend cannot update its metadata there, the
    host builds it between replays.
    """

    speculative_config: LayerSkipConfig
    model: ExitModel
    draft_attn_layer_names: set[str]

    @property
    def max_model_len(self) -> int:
        """The longest context, which vLLM may shorten to fit the memory after this is made."""
        return self.vllm_config.model_config.max_model_len

    @max_model_len.setter
    def max_model_len(self, value: int) -> None:
        """Ignore what vLLM 0.32 sets when this is made; later versions have the property."""

    @override
    def set_attn(
        self,
        model_state: ModelState,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: InputBuffers,
        target_attn_groups: list[list[AttentionGroup]],
    ) -> None:
        # The runner takes these names out of the target's checks, so it must see none: there are no
        # layers but the target's. Only the metadata of these steps is built for the first ones'.
        no_names = self.draft_attn_layer_names
        self.draft_attn_layer_names = self.model.attn_layer_names
        super().set_attn(
            model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups
        )
        self.draft_attn_layer_names = no_names

    def run_steps(
        self,
        run_one: Callable[..., None],
        graphs: DraftCudaGraphs | None,
        num_reqs: int,
        batch_desc: BatchExecutionDescriptor,
        num_tokens_across_dp: torch.Tensor | None,
        seq_lens_cpu_upper_bound: torch.Tensor | None,
        num_steps: int,
    ) -> None:
        """Run steps by replays of a graph of one, or eagerly by `run_one`.

        Without `seq_lens_cpu_upper_bound` they run without attention (profiling).
        """
        if batch_desc.cg_mode != CUDAGraphMode.FULL:
            graphs = None
        if graphs is not None and self.supports_decode_metadata_update:
            for group in self._all_attn_groups():
                group.map_to_kernel_block_table(
                    self.block_tables.input_block_tables[group.kv_cache_group_id]
                )
        # What steps update on the device is built once for all of them; a graph has its own.
        num_builds = int(graphs is None)
        if not self.supports_decode_metadata_update:
            num_builds = num_steps
        attn_metadata, slot_mappings = None, None
        for step in range(num_steps):
            if step < num_builds and seq_lens_cpu_upper_bound is not None:
                slot_mappings = build_slot_mappings_by_layer(
                    self._compute_slot_mappings(num_reqs, batch_desc.num_tokens),
                    self.kv_cache_config,
                )
                attn_metadata = self._build_uniform_attn_metadata(
                    batch_desc,
                    num_reqs,
                    num_query_per_req=1,
                    seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
                    step=step + 1,
                )
            if graphs is not None:
                graphs.run_fullgraph(batch_desc)
            else:
                run_one(
                    num_reqs,
                    batch_desc.num_tokens,
                    attn_metadata,
                    slot_mappings,
                    num_tokens_across_dp,
                    batch_desc.cg_mode,
                )

    @contextmanager
    def step_context(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Set vLLM's forward context for a step, with metadata as of the lengths on the device.

        Gives the step's tokens and their positions, `[num_tokens_padded]`.
        """
        if attn_metadata is not None and self.supports_decode_metadata_update:
            self._compute_slot_mappings(num_reqs, num_tokens_padded)
            self._update_draft_decode_metadata(attn_metadata, num_reqs)
        with set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=num_tokens_padded,
            num_tokens_across_dp=num_tokens_across_dp,
            cudagraph_runtime_mode=cudagraph_runtime_mode,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens_padded),
            is_padding=self.input_buffers.is_padding[:num_tokens_padded],
        ):
            yield (
                self.input_buffers.input_ids[:num_tokens_padded],
                self.input_buffers.positions[:num_tokens_padded],
            )

    def _compute_slot_mappings(self, num_reqs: int, num_tokens_padded: int) -> torch.Tensor:
        return self.block_tables.compute_slot_mappings(
            self.idx_mapping[:num_reqs],
            self.input_buffers.query_start_loc[: num_reqs + 1],
            self.input_buffers.positions[:num_reqs],
            num_tokens_padded,
        )

    def _all_attn_groups(self) -> list[AttentionGroup]:
        return [group for groups in self.attn_groups for group in groups]
