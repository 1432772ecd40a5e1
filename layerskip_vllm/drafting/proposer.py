"""Drafting on Model Runner V1 (CPUs, and GPUs where V2 is switched off).

`hooks` put it in the place of vLLM's `DraftModelProposer`; runs in the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from layerskip_vllm.config.request import max_num_drafts
from layerskip_vllm.config.speculative import LayerSkipConfig
from layerskip_vllm.drafting.draft_attention import (
    DraftAttention,
    group_layers,
    one_token_a_request,
)
from layerskip_vllm.drafting.draft_sampling import Sampled, generators_of_step, sample_tokens
from layerskip_vllm.drafting.exit_model import ExitModel
from layerskip_vllm.drafting.log import log_drafting
from layerskip_vllm.drafting.lookup import find_copies, needs_drafts
from layerskip_vllm.drafting.lora import make_draft_lora
from layerskip_vllm.drafting.slots import DraftSlots, find_slots
from layerskip_vllm.drafting.v1_refusals import check_runner_v1
from layerskip_vllm.drafting.verifier import Verifier

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

# A draft step has one row a request, and on CPUs PyTorch's matrix products with one to three rows
# take longer than with four: 12 against 10 ms for four layers of 2048 on two cores of an AMD EPYC.
MIN_ROWS_ON_CPU = 4


@dataclass(frozen=True)
class DraftBatch:
    """How the draft steps of a batch run, as all data-parallel ranks agree.

    Attributes:
        cudagraph_mode: Which CUDA graphs run them.
        num_tokens: Rows of a step: one a request, and padding.
        num_tokens_across_dp: `[dp_size] int32` on the host, None on a single rank.
    """

    cudagraph_mode: CUDAGraphMode
    num_tokens: int
    num_tokens_across_dp: torch.Tensor | None


class LayerSkipProposer(DraftModelProposer):
    """Drafts with the target's first layers, over the target's own KV cache.

    Differs from its base: no draft model is loaded, and no draft prefill is run, since the target
    has already written the first layers' keys and values of every token it has seen.
    """

    speculative_config: LayerSkipConfig
    model: ExitModel
    verifier: Verifier | None
    _sampled: tuple[torch.Tensor, torch.Tensor]  # tokens of the last step, and how many

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: GPUModelRunner):
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self._is_async = bool(vllm_config.scheduler_config.async_scheduling)
        check_runner_v1(self.speculative_config, device, self._is_async)
        self._prepare_and_propose = runner.propose_draft_token_ids
        vars(runner)["propose_draft_token_ids"] = self._propose_if_any
        # Not for a mixture of experts, where more rows read more experts.
        is_padded = device.type == "cpu" and not vllm_config.model_config.is_moe
        self._min_num_rows = min(MIN_ROWS_ON_CPU, self.max_num_tokens) if is_padded else 1

    @override
    def load_model(self, target_model: nn.Module) -> None:
        config = self.speculative_config
        self.model = ExitModel(target_model, config.exit_layer, self.vllm_config)
        self._draft_attn_layer_names = self.model.attn_layer_names
        self._lora = make_draft_lora(self.vllm_config, target_model)
        exit_states = self.model.exit_states
        self.verifier = None if exit_states is None else Verifier(self, exit_states)

    @override
    def initialize_attn_backend(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Group the first layers' attention by KV cache group and backend.

        Differs from its base: the layers may lie in several KV cache groups (sliding windows).
        """
        # vLLM may have found a context that fits the memory since this was made.
        self.max_model_len = self.vllm_config.model_config.max_model_len
        # Rows at the end of their context draft nothing here, so the runner need not stop the
        # whole batch from drafting for their sake.
        self.runner.effective_drafter_max_model_len = (
            self.max_model_len + self.speculative_config.num_speculative_tokens
        )
        self.draft_attn_groups = group_layers(
            self.vllm_config,
            self.device,
            self._draft_attn_layer_names,
            kv_cache_config,
            kernel_block_sizes or [],
        )
        self.attention = DraftAttention(self.draft_attn_groups, self.runner, self.max_model_len)

    @override
    def initialize_cudagraph_keys(self, cudagraph_mode: CUDAGraphMode) -> None:
        if self._lora is not None:
            # vLLM keeps no graphs of drafters with adapters in them on this runner.
            cudagraph_mode = CUDAGraphMode.NONE
        super().initialize_cudagraph_keys(cudagraph_mode)
        mode = self.cudagraph_dispatcher.cudagraph_mode.name.lower()
        log_drafting(self.model, self.speculative_config, runner="V1", graphs=mode)

    def _propose_if_any(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: torch.Tensor, *args: Any
    ) -> Any:
        """Leave out all that a draft takes, in the runner too, where a step drafts nothing.

        With asynchronous scheduling the runner's next step needs what it finds for one.
        """
        if scheduler_output.num_spec_tokens_to_schedule == 0 and not self._is_async:
            return sampled_token_ids.new_empty((len(sampled_token_ids), 0), dtype=torch.int64)
        return self._prepare_and_propose(scheduler_output, sampled_token_ids, *args)

    @override
    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: torch.Tensor,
        requests: dict[str, CachedRequestState],
        gpu_input_batch: InputBatch,
        discard_request_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the token that each request drafts from, and how many were sampled before it.

        Differs from its base: a request in the middle of its prompt drafts for nothing, so its next
        token is not looked up, which a prompt of embeddings does not have.

        Args:
            sampled_token_ids: `[num_reqs, K + 1]`, -1 after the last.
            requests: Not used.
            gpu_input_batch: The runner's.
            discard_request_mask: `[max_num_reqs] bool`, requests in the middle of their prompts.

        Returns:
            The tokens and the numbers, both `[num_reqs] int32`; the numbers are 0 where the tokens
            mean nothing.
        """
        is_sampled = (sampled_token_ids >= 0) & (sampled_token_ids < gpu_input_batch.vocab_size)
        is_sampled &= ~discard_request_mask[: len(sampled_token_ids), None]
        num_sampled = is_sampled.sum(dim=1, dtype=torch.int32)
        last = (num_sampled - 1).clamp(min=0).long()
        token_ids = sampled_token_ids.gather(1, last.unsqueeze(1)).squeeze(1)
        self._sampled = sampled_token_ids, num_sampled
        return torch.where(num_sampled > 0, token_ids, 0).int(), num_sampled

    @override
    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor:
        """Draft K tokens for each request of the batch that the target has just run.

        Gives `[num_reqs, num_speculative_tokens] int64`. A draft starts from the request's token of
        `next_token_ids`, `[num_reqs] int32`, which is not run yet, and which comes after the drafts
        that `num_rejected_tokens_gpu`, `[num_reqs] int32`, leaves standing. The `target_` tensors
        and what is not read here are of no use: the target's keys and values hold all that drafting
        needs.
        """
        self._last_draft_probs = None
        self.model.follow_weights()
        num_reqs = common_attn_metadata.batch_size()
        if num_speculative_tokens == 0:
            return next_token_ids.new_empty((num_reqs, 0), dtype=torch.int64)
        if self.speculative_config.lookup == "off":
            copies = None
        else:
            copies = find_copies(self.runner.input_batch, *self._sampled, num_speculative_tokens)
            req_ids = self.runner.input_batch.req_ids[:num_reqs]
            requests = [self.runner.requests[req_id] for req_id in req_ids]
            limits = [max_num_drafts(request.sampling_params) for request in requests]
            num_ranks = self.vllm_config.parallel_config.data_parallel_size
            if not needs_drafts(copies, self._sampled[1], limits, num_ranks):
                return copies.clamp_(min=0)
        # A request's last token comes right after all that the target has run and kept.
        positions = common_attn_metadata.seq_lens.long()
        if num_rejected_tokens_gpu is not None:
            positions = positions - num_rejected_tokens_gpu
        batch = self.pad(num_reqs)
        if self._lora is not None:
            lora_ids = self.runner.input_batch.request_lora_mapping[:num_reqs]
            self._lora.map_requests(lora_ids, batch.num_tokens)
        slots = find_slots(
            self.runner.input_batch.block_table,
            {group.kv_cache_group_id for group in self.draft_attn_groups},
            positions + self.arange[:num_speculative_tokens].unsqueeze(1),
            self.runner.discard_request_mask.gpu[:num_reqs],
            batch.num_tokens,
            self.max_model_len,
        )
        metadata = one_token_a_request(common_attn_metadata, self.arange)
        self.input_ids[:num_reqs] = next_token_ids
        if self.verifier is not None:
            self.verifier.begin_draft(num_speculative_tokens)
        drafts = self._draft(num_speculative_tokens, batch, slots, metadata, sampling_metadata)
        return drafts if copies is None else torch.where(copies < 0, drafts, copies)

    def pad(self, num_tokens: int) -> DraftBatch:
        """Pick how a pass of the first layers over so many tokens runs."""
        return self._dispatch(max(num_tokens, self._min_num_rows))

    def _dispatch(self, num_tokens: int, use_cudagraphs: bool = True) -> DraftBatch:
        """Pick the CUDA graph and the padding of a batch, the same on all DP ranks."""
        return DraftBatch(
            *self._determine_batch_execution_and_padding(num_tokens, use_cudagraphs=use_cudagraphs)
        )

    def _draft(
        self,
        num_speculative_tokens: int,
        batch: DraftBatch,
        slots: DraftSlots,
        metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
    ) -> torch.Tensor:
        """Run the draft steps: `[num_reqs, num_speculative_tokens] int64`, what they sample."""
        steps: list[Sampled] = []
        for step in range(num_speculative_tokens):
            if step > 0:
                self.input_ids[: metadata.num_reqs] = steps[-1][0]
            steps.append(self._draft_one(step, batch, slots, metadata, sampling_metadata))
        probs = [probs for _, probs in steps if probs is not None]
        if probs:
            self._last_draft_probs = torch.stack(probs, dim=1).contiguous()
        return torch.stack([token_ids for token_ids, _ in steps], dim=1)

    def _draft_one(
        self,
        step: int,
        batch: DraftBatch,
        slots: DraftSlots,
        metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
    ) -> Sampled:
        """Run one draft step on the tokens in `input_ids`: first layers, head, sampling."""
        num_reqs = metadata.num_reqs
        self.positions[:num_reqs] = slots.positions[step]
        keep = None
        if self.verifier is not None and self.verifier.exit_states.is_expected:
            keep = partial(self.verifier.exit_states.keep, step)
        hidden_states = self._run_model(
            batch, *self.attention.build_step(step, slots, metadata), keep
        )
        generators = generators_of_step(step, sampling_metadata.generators, self.runner)
        return self._sample_draft_tokens(
            hidden_states[:num_reqs], replace(sampling_metadata, generators=generators)
        )

    def _run_model(
        self,
        batch: DraftBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mapping: dict[str, torch.Tensor],
        keep: Callable[[IntermediateTensors], None] | None = None,
    ) -> torch.Tensor:
        """Run the exit model, and have its exit states kept if `keep` says where.

        Gives `[num_tokens, hidden_size]`.
        """
        with self.set_context(batch, attn_metadata, slot_mapping):
            hidden_states: torch.Tensor = self.model(
                self.input_ids[: batch.num_tokens], self.positions[: batch.num_tokens], keep=keep
            )
        return hidden_states

    def set_context(
        self,
        batch: DraftBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mapping: dict[str, torch.Tensor],
    ) -> AbstractContextManager[None]:
        """Set vLLM's forward context for a pass of the first layers."""
        return set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=batch.num_tokens,
            num_tokens_across_dp=batch.num_tokens_across_dp,
            cudagraph_runtime_mode=batch.cudagraph_mode,
            slot_mapping=slot_mapping,
        )

    @override
    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> Sampled:
        """Sample a draft token of each request, among those of the draft head if there is one."""
        token_ids, probs = super()._sample_draft_tokens(hidden_states, sampling_metadata)
        head = self.model.draft_head
        if head is None:
            return token_ids, probs
        return head.token_ids[token_ids], None if probs is None else head.widen(probs, fill=0.0)

    @override
    def _sample_from_logits(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> Sampled:
        """Sample a draft token of each request at its temperature.

        Differs from its base: a request that has a seed draws from it, so that it gets the same
        tokens again.
        """
        return sample_tokens(logits, sampling_metadata, self.use_fp64_gumbel)

    @override
    @torch.inference_mode()
    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Run the draft steps of a batch without requests (profiling, capture, idle DP ranks).

        Differs from its base: the ranks agree on a batch once, as in `propose`, not twice.
        """
        batch = self._dispatch(min(num_tokens, self.max_num_tokens), use_cudagraphs)
        for _ in range(1 if is_graph_capturing else self.num_speculative_tokens):
            self._run_model(batch, None, slot_mappings or {})
        if self.verifier is not None:
            self.verifier.dummy_run(batch)
