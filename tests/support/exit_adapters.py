"""Exit adapters that nothing has trained: at zero, or far from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layerskip_vllm.checkpoint.exit_adapter import ExitAdapter, ExitAdapterConfig, save_exit_adapter
from tests.support.checkpoints import NUM_LAYERS


def make_exit_adapter(folder: Path, std: float = 0.0, **config: Any) -> Path:
    """Write an adapter whose weights are random with `std`; fits the checkpoints of the tests."""
    sizes = {
        "exit_layer": 2,
        "num_speculative_tokens": 3,
        "rank": 8,
        "hidden_size": 64,
        "num_hidden_layers": NUM_LAYERS,
    }
    adapter = ExitAdapter(ExitAdapterConfig(**sizes | config)).initialize(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapter.scale.normal_(0, std, generator=generator)
        adapter.up.normal_(0, std, generator=generator)
    save_exit_adapter(folder, adapter)
    return folder
