"""The slots of a draft's steps, against those looked up one by one."""

from __future__ import annotations

from types import SimpleNamespace

import torch

BLOCK_SIZE, MAX_MODEL_LEN, PAD = 4, 16, -1


def test_slots_are_those_of_the_blocks_when_rows_are_active() -> None:
    from layerskip_vllm.drafting.slots import find_slots

    blocks = {0: torch.tensor([[7, 3, 5, 9], [2, 8, 4, 6], [1, 0, 0, 0]], dtype=torch.int32)}
    blocks[2] = blocks[0] + 10
    tables = {
        group_id: SimpleNamespace(
            block_size=BLOCK_SIZE, get_device_tensor=lambda num, table=table: table[:num]
        )
        for group_id, table in blocks.items()
    }
    # The second request comes to the end of its context, the third is in its prompt.
    positions = torch.tensor([[3, 15, 2], [4, 16, 3]])
    is_discarded = torch.tensor([False, False, True])
    found = find_slots(tables, (0, 2), positions, is_discarded, 5, MAX_MODEL_LEN)
    assert [step.tolist() for step in found.positions] == [[3, 15, 2], [4, 15, 3]]
    assert [step.tolist() for step in found.seq_lens] == [[4, 16, 3], [5, 16, 4]]
    for group_id, table in blocks.items():
        first, second = (int(table[0, 0]) * 4 + 3, int(table[1, 3]) * 4 + 3)
        expected = [[first, second, PAD, PAD, PAD], [int(table[0, 1]) * 4, PAD, PAD, PAD, PAD]]
        assert [step.tolist() for step in found.slot_mappings[group_id]] == expected
