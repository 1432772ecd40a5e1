"""The slots of a draft's steps in the target's KV cache, on Model Runner V1; found by `proposer`.

On V2 vLLM's own kernel finds them, step by step, for the positions that `kernels` writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.block_table import MultiGroupBlockTable


@dataclass(frozen=True)
class DraftSlots:
    """Where each step of a draft reads and writes; known before its first token is.

    Rows that draft for nothing (a prompt's chunk that is not its last, a request at the end of its
    context) run along but write no keys and values.

    Attributes:
        positions: `[num_reqs] int64`, step by step.
        seq_lens: `[num_reqs] int32`, with the step's own token.
        slot_mappings: `[num_input_tokens] int64` by KV cache group; `PAD_SLOT_ID` where nothing is
            written.
    """

    positions: tuple[torch.Tensor, ...]
    seq_lens: tuple[torch.Tensor, ...]
    slot_mappings: dict[int, tuple[torch.Tensor, ...]]


def find_slots(
    block_tables: MultiGroupBlockTable,
    group_ids: Iterable[int],
    positions: torch.Tensor,
    is_discarded: torch.Tensor,
    num_input_tokens: int,
    max_model_len: int,
) -> DraftSlots:
    """Look up the slots of all steps of a draft.

    Args:
        block_tables: The blocks of each request, by KV cache group.
        group_ids: The KV cache groups of the layers that draft.
        positions: `[num_steps, num_reqs] int64`, may lie past the context's end.
        is_discarded: `[num_reqs] bool`, requests in the middle of their prompts.
        num_input_tokens: Rows of a step, with padding.
        max_model_len: The first position that cannot be run.

    Returns:
        The slots.
    """
    num_steps, num_reqs = positions.shape
    is_active = (positions < max_model_len) & ~is_discarded
    positions = positions.clamp(max=max_model_len - 1)
    slot_mappings = {}
    for group_id in group_ids:
        block_table = block_tables[group_id]
        block_size = block_table.block_size
        blocks = block_table.get_device_tensor(num_reqs)
        block_ids = blocks.gather(1, (positions // block_size).T).T.long()
        slots = block_ids * block_size + positions % block_size
        slot_mapping = slots.new_full((num_steps, num_input_tokens), PAD_SLOT_ID)
        slot_mapping[:, :num_reqs] = torch.where(is_active, slots, PAD_SLOT_ID)
        slot_mappings[group_id] = slot_mapping.unbind()
    return DraftSlots(positions.unbind(), (positions + 1).int().unbind(), slot_mappings)
