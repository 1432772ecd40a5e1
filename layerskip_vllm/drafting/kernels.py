"""The kernels around the draft steps on Model Runner V2: one program a request, no host sync.

They can be recorded in a CUDA graph: they read and write buffers that keep their addresses. A row
whose entry in `idx_mapping` is -1 drafts for nothing; vLLM's slot mapping kernel then writes no
keys and values for it, and its sampling kernel stores no logits.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers


@triton.jit  # type: ignore[untyped-decorator]
def _pad_rows(  # type: ignore[no-untyped-def]
    num_reqs,
    max_num_reqs,
    query_start_loc_ptr,
    seq_lens_ptr,
    is_padding_ptr,
    steps_ptr,
    idx_mapping_ptr,
    BLOCK_SIZE: tl.constexpr,
):
    """Give each row a query of one token, and rows past the batch none, for any CUDA graph."""
    for start in range(0, max_num_reqs + 1, BLOCK_SIZE):
        block = start + tl.arange(0, BLOCK_SIZE)
        tl.store(
            query_start_loc_ptr + block,
            tl.minimum(block, num_reqs),
            mask=block < max_num_reqs + 1,
        )
    for start in range(num_reqs, max_num_reqs, BLOCK_SIZE):
        block = start + tl.arange(0, BLOCK_SIZE)
        is_row = block < max_num_reqs
        tl.store(seq_lens_ptr + block, 0, mask=is_row)
        tl.store(is_padding_ptr + block, 1, mask=is_row)
        tl.store(steps_ptr + block, 0, mask=is_row)
        tl.store(idx_mapping_ptr + block, -1, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _prepare_draft_kernel(  # type: ignore[no-untyped-def]
    input_ids_ptr,
    positions_ptr,
    is_padding_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    steps_ptr,
    idx_mapping_ptr,
    target_seq_lens_ptr,
    num_sampled_ptr,
    num_rejected_ptr,
    last_sampled_ptr,
    max_model_len,
    max_num_reqs,
    BLOCK_SIZE: tl.constexpr,
):
    req_idx = tl.program_id(0)
    num_reqs = tl.num_programs(0) - 1
    if req_idx == num_reqs:
        _pad_rows(
            num_reqs,
            max_num_reqs,
            query_start_loc_ptr,
            seq_lens_ptr,
            is_padding_ptr,
            steps_ptr,
            idx_mapping_ptr,
            BLOCK_SIZE,
        )
        return

    req_state_idx = tl.load(idx_mapping_ptr + req_idx)
    # The last sampled token comes right after all that the target has run and kept.
    position = tl.load(target_seq_lens_ptr + req_idx) - tl.load(num_rejected_ptr + req_idx)
    # Without a sampled token the request is in the middle of its prompt.
    is_active = (
        (req_state_idx >= 0) & (tl.load(num_sampled_ptr + req_idx) > 0) & (position < max_model_len)
    )
    token = tl.load(last_sampled_ptr + req_state_idx, mask=is_active, other=0)
    position = tl.where(is_active, position, 0)
    tl.store(idx_mapping_ptr + req_idx, tl.where(is_active, req_state_idx, -1))
    tl.store(input_ids_ptr + req_idx, token.to(tl.int32))
    tl.store(positions_ptr + req_idx, position)
    tl.store(is_padding_ptr + req_idx, ~is_active)
    tl.store(seq_lens_ptr + req_idx, position + 1)
    tl.store(steps_ptr + req_idx, 0)


def prepare_draft(
    buffers: InputBuffers,
    steps: torch.Tensor,
    idx_mapping: torch.Tensor,
    num_reqs: int,
    seq_lens: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    last_sampled: torch.Tensor,
    max_model_len: int,
) -> None:
    """Set up the first draft step: each request's last token, at its own position.

    Args:
        buffers: Written: `input_ids`, `positions`, `is_padding` (rows that draft for nothing, which
            a mixture of experts leaves out), `query_start_loc` and `seq_lens`.
        steps: `[max_num_reqs] int64`, each row's draft step, set to 0.
        idx_mapping: `[max_num_reqs] int64`, request to request state; set to -1 for rows that
            draft for nothing (the middle of a prompt, the end of the context).
        num_reqs: The size of the batch that the target has just run.
        seq_lens: `[num_reqs] int32`, each request's tokens in that run and before.
        num_sampled: `[num_reqs] int32`, tokens that it sampled; 0 in the middle of a prompt.
        num_rejected: `[num_reqs] int32`, drafts that it refused.
        last_sampled: `[max_num_reqs, 1] or [max_num_reqs]`, by request state.
        max_model_len: The first position that cannot be run.
    """
    _prepare_draft_kernel[(num_reqs + 1,)](
        buffers.input_ids,
        buffers.positions,
        buffers.is_padding,
        buffers.query_start_loc,
        buffers.seq_lens,
        steps,
        idx_mapping,
        seq_lens,
        num_sampled,
        num_rejected,
        last_sampled,
        max_model_len,
        buffers.max_num_reqs,
        BLOCK_SIZE=1024,
    )


@triton.jit
def _advance_draft_kernel(  # type: ignore[no-untyped-def]
    draft_tokens_ptr,
    draft_tokens_stride,
    num_steps,
    steps_ptr,
    input_ids_ptr,
    positions_ptr,
    is_padding_ptr,
    seq_lens_ptr,
    idx_mapping_ptr,
    sampled_ptr,
    max_model_len,
):
    req_idx = tl.program_id(0)
    token = tl.load(sampled_ptr + req_idx)
    step = tl.load(steps_ptr + req_idx)
    # Captures and warm-ups run steps without a draft that they would be of.
    is_drafting = step < num_steps
    tl.store(draft_tokens_ptr + req_idx * draft_tokens_stride + step, token, mask=is_drafting)
    tl.store(steps_ptr + req_idx, step + 1)

    if tl.load(idx_mapping_ptr + req_idx) < 0:
        return
    position = tl.load(positions_ptr + req_idx) + 1
    if position >= max_model_len:
        tl.store(idx_mapping_ptr + req_idx, -1)
        tl.store(is_padding_ptr + req_idx, 1)
        return
    tl.store(input_ids_ptr + req_idx, token.to(tl.int32))
    tl.store(positions_ptr + req_idx, position)
    tl.store(seq_lens_ptr + req_idx, (position + 1).to(tl.int32))


def advance_draft(
    draft_tokens: torch.Tensor,
    steps: torch.Tensor,
    buffers: InputBuffers,
    idx_mapping: torch.Tensor,
    sampled: torch.Tensor,
    max_model_len: int,
) -> None:
    """Record the tokens of a draft step and feed them to the next, one position further.

    The step is on the device, a copy for each row, so that no program waits for another and one
    CUDA graph is any step.

    Args:
        draft_tokens: `[max_num_reqs, num_speculative_tokens] int64`; the step's column is written.
        steps: `[max_num_reqs] int64`, each row's step; moved on by one.
        buffers: Written: `input_ids`, `positions`, `is_padding` and `seq_lens`.
        idx_mapping: `[max_num_reqs] int64`; set to -1 for rows that reach the end of the context.
        sampled: `[num_reqs] int64`, the step's tokens.
        max_model_len: The first position that cannot be run.
    """
    _advance_draft_kernel[(sampled.shape[0],)](
        draft_tokens,
        draft_tokens.stride(0),
        draft_tokens.shape[1],
        steps,
        buffers.input_ids,
        buffers.positions,
        buffers.is_padding,
        buffers.seq_lens,
        idx_mapping,
        sampled,
        max_model_len,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _prepare_last_tokens_kernel(  # type: ignore[no-untyped-def]
    input_ids_ptr,
    positions_ptr,
    is_padding_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    steps_ptr,
    idx_mapping_ptr,
    target_input_ids_ptr,
    target_query_start_loc_ptr,
    target_seq_lens_ptr,
    target_idx_mapping_ptr,
    max_num_reqs,
    BLOCK_SIZE: tl.constexpr,
):
    req_idx = tl.program_id(0)
    num_reqs = tl.num_programs(0) - 1
    if req_idx == num_reqs:
        _pad_rows(
            num_reqs,
            max_num_reqs,
            query_start_loc_ptr,
            seq_lens_ptr,
            is_padding_ptr,
            steps_ptr,
            idx_mapping_ptr,
            BLOCK_SIZE,
        )
        return

    last = tl.load(target_query_start_loc_ptr + req_idx + 1) - 1
    seq_len = tl.load(target_seq_lens_ptr + req_idx)
    tl.store(idx_mapping_ptr + req_idx, tl.load(target_idx_mapping_ptr + req_idx))
    tl.store(input_ids_ptr + req_idx, tl.load(target_input_ids_ptr + last))
    tl.store(positions_ptr + req_idx, (seq_len - 1).to(tl.int64))
    tl.store(is_padding_ptr + req_idx, 0)
    tl.store(seq_lens_ptr + req_idx, seq_len)
    first = tl.load(target_query_start_loc_ptr + req_idx)
    tl.store(steps_ptr + req_idx, (last - first).to(tl.int64))


def prepare_last_tokens(
    buffers: InputBuffers, steps: torch.Tensor, idx_mapping: torch.Tensor, input_batch: InputBatch
) -> None:
    """Set up a step over the last token of each request in a batch of the target.

    Args:
        buffers: Written: `input_ids`, `positions`, `is_padding`, `query_start_loc` and `seq_lens`.
        steps: `[max_num_reqs] int64`, set to how many tokens of the request come before it in the
            batch, which is the draft step that it would be.
        idx_mapping: `[max_num_reqs] int64`, set to the request state of each.
        input_batch: The batch that the target is about to run.
    """
    _prepare_last_tokens_kernel[(input_batch.num_reqs + 1,)](
        buffers.input_ids,
        buffers.positions,
        buffers.is_padding,
        buffers.query_start_loc,
        buffers.seq_lens,
        steps,
        idx_mapping,
        input_batch.input_ids,
        input_batch.query_start_loc,
        input_batch.seq_lens,
        input_batch.idx_mapping,
        buffers.max_num_reqs,
        BLOCK_SIZE=1024,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _keep_rows_kernel(  # type: ignore[no-untyped-def]
    kept_ptr,
    kept_stride,
    rows_ptr,
    rows_stride,
    idx_mapping_ptr,
    steps_ptr,
    max_num_reqs,
    size,
    BLOCK_SIZE: tl.constexpr,
):
    req_idx = tl.program_id(0).to(tl.int64)
    req_state_idx = tl.load(idx_mapping_ptr + req_idx)
    if req_state_idx < 0:
        return
    kept_row = tl.load(steps_ptr + req_idx) * max_num_reqs + req_state_idx
    for start in range(0, size, BLOCK_SIZE):
        block = start + tl.arange(0, BLOCK_SIZE)
        values = tl.load(rows_ptr + req_idx * rows_stride + block, mask=block < size)
        tl.store(kept_ptr + kept_row * kept_stride + block, values, mask=block < size)


def keep_rows(
    kept: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor, idx_mapping: torch.Tensor
) -> None:
    """Keep what a step has made of each request, by step and request state.

    Args:
        kept: `[num_steps * max_num_reqs, size]`; row `step * max_num_reqs + state` is written.
        rows: `[num_reqs, size]`, with padding or without.
        steps: `[max_num_reqs] int64`, each row's step.
        idx_mapping: `[max_num_reqs] int64`, each row's request state; rows with -1 are left out.
    """
    _keep_rows_kernel[(rows.shape[0],)](
        kept,
        kept.stride(0),
        rows,
        rows.stride(0),
        idx_mapping,
        steps,
        idx_mapping.shape[0],
        rows.shape[1],
        BLOCK_SIZE=1024,
    )
