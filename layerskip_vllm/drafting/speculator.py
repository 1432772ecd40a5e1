"""Drafting on Model Runner V2, the default on GPUs, written for CUDA graphs.

`hooks` have vLLM's `init_speculator` make it; runs in the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.lora_utils import NO_LORA_ID, LoraState
from vllm.v1.worker.gpu.states import RequestState

from layerskip_vllm.drafting.cuda_graphs import DraftCudaGraphs, RemainingLayersCudaGraphs
from layerskip_vllm.drafting.device_verifier import DeviceVerifier
from layerskip_vllm.drafting.exit_model import ExitModel
from layerskip_vllm.drafting.kernels import advance_draft, prepare_draft
from layerskip_vllm.drafting.log import log_drafting
from layerskip_vllm.drafting.lora import DraftLoRA, make_draft_lora
from layerskip_vllm.drafting.one_token_steps import OneTokenSteps
from layerskip_vllm.drafting.target_graphs import take_any_mix

if TYPE_CHECKING:
    from layerskip_vllm.drafting.device_lookup import DeviceLookup


class LayerSkipSpeculator(OneTokenSteps):
    """Drafts with the target's first layers, over the target's own KV cache.

    All K steps are alike, one token a request: the target has already written the first layers'
    keys and values of every token it has seen, so there is no draft prefill. One CUDA graph of one
    step is replayed for each, whatever K is.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState):
        super().__init__(vllm_config, device)
        self.lookup = self._make_lookup(req_states)
        self.draft_steps = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        # Here, where vLLM looks for what it captured to measure memory, and drops it.
        self.graphs: DraftCudaGraphs | None = None
        self.last_token_graphs: DraftCudaGraphs | None = None
        self.remaining_graphs: RemainingLayersCudaGraphs | None = None
        self.verifier: DeviceVerifier | None = None
        self.lora: DraftLoRA | None = None
        self.lora_ids: Sequence[int] = ()
        self.is_lora_mapped = False

    def _make_lookup(self, req_states: RequestState) -> DeviceLookup | None:
        if self.speculative_config.lookup == "off":
            return None
        # Only here: it needs a private kernel of vLLM's, of which drafts know nothing.
        from layerskip_vllm.drafting.device_lookup import DeviceLookup

        return DeviceLookup(req_states, may_leave_out=self.dp_size == 1)  # ranks draft alike

    @override
    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> ExitModel:
        self.lora = make_draft_lora(self.vllm_config, target_model)
        config = self.speculative_config
        self.model = ExitModel(target_model, config.exit_layer, self.vllm_config)
        if self.model.exit_states is not None:
            self.verifier = DeviceVerifier(self, self.model.exit_states)
        return self.model

    @override
    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        is_full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        if self.speculative_config.enforce_eager:
            is_full = False
        mode = CUDAGraphMode.FULL_DECODE_ONLY if is_full else CUDAGraphMode.NONE
        self.graphs = DraftCudaGraphs(self.vllm_config, self.device, mode, self.lora)
        if self.verifier is not None:
            self.last_token_graphs = DraftCudaGraphs(self.vllm_config, self.device, mode, None)
            self.last_token_graphs.leave_out_below(self.verifier.min_num_reqs)
        log_drafting(
            self.model,
            self.speculative_config,
            runner="V2",
            graphs="one a draft step" if is_full else "none",
        )

    @override
    def capture(self) -> None:
        assert self.graphs is not None
        self.idx_mapping.fill_(-1)
        self.graphs.capture(
            self._draft_one,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing draft CUDA graphs",
        )
        if self.verifier is not None:
            self.verifier.capture()

    def prepare_target_graphs(self, runner: Any) -> None:
        """Have the runner's graphs take drafts of any length; called before they are captured."""
        take_any_mix(runner)
        if self.verifier is not None:
            self.verifier.attach(runner)

    def prepare_sampling(self, lora_state: LoraState, input_batch: InputBatch) -> None:
        """Map the rows that are to be verified, and afterwards drafted from, to their adapters.

        vLLM's runner maps one row a request, whose head would then have no adapter in the rows of
        its drafts; called before it samples.

        Args:
            lora_state: The runner's, with the adapter of each request state.
            input_batch: The batch that the target has just run.
        """
        if self.lora is None:
            return
        lora_ids = lora_state.lora_ids[input_batch.idx_mapping_np]
        self.lora_ids = lora_ids.tolist()
        # On GPUs vLLM's kernels skip a batch without adapters, whatever its rows. The target's
        # mapping says so already, and another would make the host wait for the device.
        self.is_lora_mapped = bool((lora_ids != NO_LORA_ID).any()) or self.device.type == "cpu"
        if self.is_lora_mapped:
            self.lora.map_logits(lora_ids, np.diff(input_batch.cu_num_logits_np))

    @override
    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft K tokens for each request of the batch that the target has just run.

        Args:
            input_batch: That batch.
            attn_metadata: Not used, like the other tensors of the target's step: its keys and
                values hold all that drafting needs.
            slot_mappings: Not used.
            last_hidden_states: Not used.
            aux_hidden_states: Not used.
            num_sampled: `[num_reqs] int32`, 0 in the middle of a prompt.
            num_rejected: `[num_reqs] int32`.
            last_sampled: `[max_num_reqs, 1]`, by request state.
            next_prefill_tokens: Not used.
            temperature: `[max_num_reqs] float32`.
            seeds: `[max_num_reqs] int64`.
            dp_sync_state: What the data-parallel ranks agreed on for the target's step.
            dummy_run: Whether the batch has no requests behind it.
            skip_attn_for_dummy_run: Whether to run without attention metadata then.
            mm_inputs: Not used.
            is_profile: Whether vLLM is measuring memory, before there is a KV cache.
            num_speculative_tokens: K for this batch; all that the configuration allows if None.

        Returns:
            `[num_reqs, max K] int64`; the columns past this batch's K mean nothing.
        """
        self.model.follow_weights()
        num_reqs = input_batch.num_reqs
        if dummy_run and dp_sync_state is not None:
            # An idle rank's batch may be that of a larger graph; the ranks draft for as many
            # requests as the busiest of them has.
            num_reqs = min(num_reqs, dp_sync_state.num_reqs)
        if num_speculative_tokens is None:
            num_speculative_tokens = self.num_speculative_steps
        if num_speculative_tokens == 0:
            if self.lookup is not None:
                self.lookup.forget()
            if self.verifier is not None:
                self.verifier.forget()
            return self.draft_tokens[:num_reqs].fill_(-1)
        lookup = None if dummy_run else self.lookup
        has_draft_steps = lookup is None or not lookup.expects_copies(input_batch)
        longest = int(input_batch.seq_lens_cpu_upper_bound[:num_reqs].max())
        self.draft_max_seq_len = min(longest + num_speculative_tokens, self.max_model_len)
        self._copy_request_inputs(
            num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run
        )
        prepare_draft(
            self.input_buffers,
            self.draft_steps,
            self.idx_mapping,
            num_reqs,
            input_batch.seq_lens,
            num_sampled,
            num_rejected,
            last_sampled,
            self.max_model_len,
        )
        if self.lookup is not None:
            self.lookup.copy_drafts(
                self.draft_tokens,
                self.input_buffers,
                self.draft_steps,
                self.idx_mapping,
                input_batch,
                # A dummy run has the kernels compiled, but no requests behind its rows.
                torch.zeros_like(num_sampled) if dummy_run else num_sampled,
                last_sampled,
                temperature,
                has_draft_steps,
            )
        if not has_draft_steps:
            return self.draft_tokens[:num_reqs]
        lora_ids = (NO_LORA_ID,) * num_reqs if dummy_run else self.lora_ids
        batch_desc, num_tokens_across_dp = self._dispatch(
            num_reqs, set(lora_ids), dp_sync_state, is_profile
        )
        if self.lora is not None and (dummy_run or self.is_lora_mapped):
            self.lora.map_requests(lora_ids, batch_desc.num_tokens)
        self.run_steps(
            self._draft_one,
            self.graphs,
            num_reqs,
            batch_desc,
            num_tokens_across_dp,
            None if dummy_run and skip_attn_for_dummy_run else input_batch.seq_lens_cpu_upper_bound,
            num_speculative_tokens,
        )
        if self.verifier is not None:
            if is_profile:
                self.verifier.compile()
            elif not dummy_run:
                self.verifier.expect(input_batch, batch_desc.num_tokens, num_speculative_tokens)
        return self.draft_tokens[:num_reqs]

    def _dispatch(
        self,
        num_reqs: int,
        lora_ids: set[int],
        dp_sync_state: DPSyncState | None,
        is_profile: bool,
    ) -> tuple[BatchExecutionDescriptor, torch.Tensor | None]:
        """Pick the CUDA graph of a batch with one token a request, the same on all DP ranks."""
        num_tokens = num_reqs
        if dp_sync_state is not None:
            dp_sync_state, num_tokens = self._build_uniform_batch_dp_sync(dp_sync_state, num_reqs)
        if is_profile and num_tokens == 1 < self.max_num_tokens:
            # The run that compiles: from a single row it would make the number of rows a constant.
            num_tokens = 2
            if dp_sync_state is not None:
                across_dp = torch.full_like(dp_sync_state.num_tokens_across_dp, num_tokens)
                dp_sync_state = replace(dp_sync_state, num_tokens_across_dp=across_dp)
        batch_desc, dp_sync_state = dispatch_cg_and_sync_dp(
            self.graphs,
            num_reqs,
            num_tokens,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=is_profile,
            num_active_loras=len(lora_ids - {NO_LORA_ID}),
            dp_sync_state=dp_sync_state,
        )
        return batch_desc, None if dp_sync_state is None else dp_sync_state.num_tokens_across_dp

    def _draft_one(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int | None = None,
    ) -> None:
        """Run one draft step: first layers, head, sampling, and the next step's inputs.

        All of it is on the device and the same in each step, for one CUDA graph. `capture` gives
        `num_speculative_steps`, which is of no use.
        """
        with self.step_context(
            num_reqs,
            num_tokens_padded,
            attn_metadata,
            slot_mappings,
            num_tokens_across_dp,
            cudagraph_runtime_mode,
        ) as (input_ids, positions):
            keep = None
            if self.verifier is not None and self.verifier.keeps(num_tokens_padded):
                keep = partial(self.verifier.keep, num_reqs)
            hidden_states = self.model(input_ids, positions, keep=keep)
        sampled = self.sample_draft(
            hidden_states[:num_reqs],
            # vLLM keys a draw by the position before the sampled token, which is the input's.
            positions[:num_reqs],
            self.idx_mapping[:num_reqs],
            self.temperature,
            self.seeds,
            # All rows are at the same step; of a step for each row vLLM's acceptance estimator
            # takes them to be all steps of one request.
            self.draft_steps[0],
            self.draft_logits,
        )
        advance_draft(
            self.draft_tokens,
            self.draft_steps,
            self.input_buffers,
            self.idx_mapping,
            sampled,
            self.max_model_len,
        )

    @override
    def compute_draft_logits(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        logits: torch.Tensor = super().compute_draft_logits(hidden_states, spec_step_idx)
        head = self.model.draft_head
        if head is None or self.draft_logits is None:
            return logits
        # What is sampled from, and kept for verification, is over the target's vocabulary.
        return head.widen(logits, fill=-torch.inf)

    @override
    def sample_draft(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        sampled: torch.Tensor = super().sample_draft(*args, **kwargs)
        head = self.model.draft_head
        if head is None or self.draft_logits is not None:
            return sampled
        return head.token_ids[sampled]
