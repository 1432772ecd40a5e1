"""What vLLM's LoRA kernels read, set from the host."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from layerskip_vllm.hooks.lora_fixes import set_kernel_metadata


@pytest.mark.parametrize("captured", [[], [1, 2, 4, 5]])
def test_lora_metadata_is_vllms_when_it_comes_from_the_host(captured: list[int]) -> None:
    """One after the other, so that what a batch leaves over would show in the next."""
    generator = np.random.default_rng(0)
    expected: Any = LoRAKernelMeta.make(4, 32, "cpu", captured)
    for tensor in (expected.token_lora_mapping, expected.token_indices_sorted_by_lora_ids):
        tensor.zero_()
    found = copy.deepcopy(expected)
    for num_rows, num_slots in [(1, 0), (7, 1), (32, 4), (3, 0), (20, 3), (5, 4), (1, 1)]:
        slots = generator.integers(-1, num_slots, num_rows).astype(np.int32)
        expected.prepare_tensors(torch.from_numpy(slots).long())
        set_kernel_metadata(found, slots)
        for name, value in vars(expected).items():
            given = getattr(found, name)
            is_same = torch.equal(given, value) if torch.is_tensor(value) else given == value
            assert is_same, name
