"""How the draft steps of Model Runner V2 are run: by replays of one step's graph, or eagerly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from layerskip_vllm.drafting import one_token_steps
from layerskip_vllm.drafting.one_token_steps import OneTokenSteps


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize(
    ("mode", "updates_on_device", "expected"),
    [
        (CUDAGraphMode.FULL, True, "table" + " replay" * 5),
        (CUDAGraphMode.FULL, False, "build replay " * 5),
        (CUDAGraphMode.NONE, True, "build" + " eager" * 5),
        (CUDAGraphMode.NONE, False, "build eager " * 5),
    ],
    ids=["graph", "graph-rebuilt", "eager", "eager-rebuilt"],
)
def test_one_graph_is_replayed_for_each_step_when_k_is_any(
    monkeypatch: pytest.MonkeyPatch,
    mode: CUDAGraphMode,
    updates_on_device: bool,
    expected: str,
    num_steps: int,
) -> None:
    """And metadata is built on the host as often as the attention backend needs."""
    done: list[str] = []
    monkeypatch.setattr(one_token_steps, "build_slot_mappings_by_layer", lambda *a: {})
    group: Any = SimpleNamespace(
        kv_cache_group_id=0, map_to_kernel_block_table=lambda table: done.append("table")
    )
    desc = BatchExecutionDescriptor(mode, 4, 4, 1)
    drafter: Any = SimpleNamespace(
        supports_decode_metadata_update=updates_on_device,
        block_tables=SimpleNamespace(input_block_tables=[None]),
        kv_cache_config=None,
        _all_attn_groups=lambda: [group],
        _compute_slot_mappings=lambda *a: None,
        _build_uniform_attn_metadata=lambda *a, **k: done.append("build"),
    )
    graphs: Any = SimpleNamespace(run_fullgraph=lambda d: done.append("replay"))
    OneTokenSteps.run_steps(
        drafter,
        lambda *a: done.append("eager"),
        graphs,
        3,
        desc,
        None,
        torch.ones(3),
        num_steps,
    )
    pattern = expected.split()
    once = pattern[:1] if len(pattern) == 6 else []
    assert done == once + pattern[len(once) :][: num_steps * (len(pattern) // 5)]
