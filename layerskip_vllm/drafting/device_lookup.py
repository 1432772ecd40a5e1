"""Drafts copied from a request's own text where it repeats itself, on Model Runner V2.

The rule is that of `lookup`, followed on the device. `speculator` calls this in the worker.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import _ngram_scan_kernel
from vllm.v1.worker.gpu.states import RequestState

from layerskip_vllm.config.engine_refusals import check_lookup_table
from layerskip_vllm.drafting.lookup import MAX_MATCH, MIN_MATCH

# Tokens that a program of vLLM's kernel looks through.
BLOCK_SIZE = 256


class DeviceLookup:
    """Copies in the place of drafts, without the host knowing in which rows.

    The host leaves out the draft steps of a batch in which the text of each request repeated itself
    at full length (`MAX_MATCH`) the step before. Where it has ended since, a row has no draft once.
    """

    def __init__(self, req_states: RequestState, may_leave_out: bool):
        """Make the buffers, which keep their addresses.

        Args:
            req_states: The runner's, with the table of all tokens on the device.
            may_leave_out: Whether draft steps may be left out: data-parallel ranks draft alike.

        Raises:
            ValueError: If that table is too large, at a size that was not known before.
        """
        check_lookup_table(req_states.max_num_reqs, req_states.max_model_len)
        self._req_states = req_states
        self._may_leave_out = may_leave_out
        num_blocks = triton.cdiv(req_states.max_model_len, BLOCK_SIZE)
        max_num_reqs, device = req_states.max_num_reqs, req_states.device
        self._scores = torch.zeros((max_num_reqs, num_blocks), dtype=torch.int64, device=device)
        # By request state, as of the last step in which it sampled.
        self._is_repeating = torch.zeros(max_num_reqs, dtype=torch.bool, device=device)
        self._was_repeating = torch.zeros(
            max_num_reqs, dtype=torch.bool, pin_memory=is_pin_memory_available()
        )
        self._is_copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def expects_copies(self, input_batch: InputBatch) -> bool:
        """Say whether each request is expected to find a copy.

        Waits for what was found the step before, ahead of its draft steps: the device has these and
        all of the batch's work queued by now, so it does not run dry. All ranks expect the same.

        Args:
            input_batch: The batch that the target has just run.

        Returns:
            Whether each did at full length the step before; not where a prompt is among them, or
            where draft steps may not be left out.
        """
        if input_batch.has_prefill or not self._may_leave_out:
            return False
        with gpu_sync_allowed():
            self._is_copied.synchronize()
        return bool(self._was_repeating[input_batch.idx_mapping_np].all())

    def forget(self) -> None:
        """Expect no copies until the next are looked for: a step without drafts looks for none.

        A row may be another request's by then.
        """
        self._is_repeating.zero_()
        self._hand_over()

    def _hand_over(self) -> None:
        """Copy what was found to the host, which waits for it when it asks."""
        self._was_repeating.copy_(self._is_repeating, non_blocking=True)
        self._is_copied.record()

    def copy_drafts(
        self,
        draft_tokens: torch.Tensor,
        buffers: InputBuffers,
        steps: torch.Tensor,
        idx_mapping: torch.Tensor,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        last_sampled: torch.Tensor,
        temperature: torch.Tensor,
        has_draft_steps: bool,
    ) -> None:
        """Write copies where there are any, and take their rows out of the draft steps.

        Args:
            draft_tokens: `[max_num_reqs, num_speculative_tokens] int64`; rows with a copy are
                written, and those that have no draft otherwise: there the last token is repeated.
            buffers: Those of the draft steps; `positions`, `seq_lens` and `is_padding` are written.
            steps: `[max_num_reqs] int64`, each row's draft step; past the last for rows that are
                written, so that no draft step writes them.
            idx_mapping: `[max_num_reqs] int64`, that of the draft steps; set to -1 for rows that
                are written, which then draft for nothing.
            input_batch: The batch that the target has just run.
            num_sampled: `[num_reqs] int32`, 0 in the middle of a prompt and where there is no
                request: what is known of the row's is left alone then.
            last_sampled: `[max_num_reqs, 1]`, by request state.
            temperature: `[max_num_reqs] float32`, by request state.
            has_draft_steps: Whether draft steps follow.
        """
        states = self._req_states
        table, total_len = states.all_token_ids.gpu, states.total_len.gpu
        longest = int(input_batch.seq_lens_cpu_upper_bound[: input_batch.num_reqs].max()) + 1
        num_blocks = min(triton.cdiv(longest, BLOCK_SIZE), self._scores.shape[1])
        _ngram_scan_kernel[(input_batch.num_reqs, num_blocks)](
            table,
            table.stride(0),
            input_batch.idx_mapping,
            total_len,
            num_sampled,
            self._scores,
            self._scores.stride(0),
            states.max_model_len,
            MIN_MATCH,
            MAX_MATCH,
            triton.next_power_of_2(MAX_MATCH),
            BLOCK_SIZE,
        )
        _copy_drafts_kernel[(input_batch.num_reqs,)](
            draft_tokens,
            draft_tokens.stride(0),
            draft_tokens.shape[1],
            buffers.positions,
            buffers.seq_lens,
            buffers.is_padding,
            steps,
            idx_mapping,
            self._is_repeating,
            table,
            table.stride(0),
            input_batch.idx_mapping,
            total_len,
            states.prefill_len.gpu,
            num_sampled,
            last_sampled,
            temperature,
            self._scores,
            self._scores.stride(0),
            num_blocks,
            states.max_model_len,
            int(has_draft_steps),
            int(self._may_leave_out),
            MAX_MATCH=MAX_MATCH,
            BLOCK_SIZE=128,
        )
        self._hand_over()


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_blocks", "has_draft_steps", "may_leave_out"]
)
def _copy_drafts_kernel(  # type: ignore[no-untyped-def]
    draft_tokens_ptr,
    draft_tokens_stride,
    num_steps,
    positions_ptr,
    seq_lens_ptr,
    is_padding_ptr,
    steps_ptr,
    idx_mapping_ptr,
    is_repeating_ptr,
    token_ids_ptr,
    token_ids_stride,
    target_idx_mapping_ptr,
    total_len_ptr,
    prefill_len_ptr,
    num_sampled_ptr,
    last_sampled_ptr,
    temperature_ptr,
    scores_ptr,
    scores_stride,
    num_blocks,
    max_model_len,
    has_draft_steps,
    may_leave_out,
    MAX_MATCH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_sampled = tl.load(num_sampled_ptr + row)
    if num_sampled == 0:
        return  # in the middle of its prompt
    state = tl.load(target_idx_mapping_ptr + row).to(tl.int64)

    # What vLLM's kernel found: the match's length and place in one number, 0 for none.
    best = tl.zeros([BLOCK_SIZE], dtype=tl.int64)
    for start in range(0, num_blocks, BLOCK_SIZE):
        block = start + tl.arange(0, BLOCK_SIZE)
        scores = tl.load(scores_ptr + row * scores_stride + block, mask=block < num_blocks, other=0)
        best = tl.maximum(best, scores)
    score = tl.max(best, axis=0)
    has_copy = score > 0
    num_matched = (score - 1) // (max_model_len + 1)
    source = (score - 1) % (max_model_len + 1) + num_matched

    # The host left out the draft steps if it expected a copy in every row. A row of which it did
    # has no draft then. One that samples has none beside other rows either, so that a seed gives
    # the same tokens beside any neighbours, unless draft steps are never left out; its first token
    # after a prompt was never expected.
    length = tl.load(total_len_ptr + state)
    is_first = length - num_sampled <= tl.load(prefill_len_ptr + state)
    was_repeating = (tl.load(is_repeating_ptr + state) != 0) & ~is_first
    samples = tl.load(temperature_ptr + state) > 0
    is_drafting = (has_draft_steps != 0) & ~(was_repeating & samples & (may_leave_out != 0))
    tl.store(is_repeating_ptr + state, has_copy & (num_matched == MAX_MATCH))
    if is_drafting & ~has_copy:
        return

    tl.store(idx_mapping_ptr + row, -1)
    tl.store(positions_ptr + row, 0)
    tl.store(seq_lens_ptr + row, 1)
    tl.store(is_padding_ptr + row, 1)
    tl.store(steps_ptr + row, num_steps)
    last_token = tl.load(last_sampled_ptr + state)
    period = tl.where(has_copy, length - source, 1)
    for step in range(num_steps):
        copied = tl.load(
            token_ids_ptr + state * token_ids_stride + source + step % period,
            mask=has_copy,
            other=0,
        )
        token = tl.where(has_copy, copied.to(tl.int64), last_token)
        tl.store(draft_tokens_ptr + row * draft_tokens_stride + step, token)
