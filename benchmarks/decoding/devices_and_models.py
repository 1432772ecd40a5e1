"""Devices by their makers' figures and models by their `config.json`, for `step_model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.decoding.step_model import Device

# What a GPU reaches of its maker's figures, and what its steps cost besides: assumptions. The first
# three were chosen on Llama 3.1 8B at batch 1, the all-reduce on gpt-fast's speeds by
# tensor-parallel size, the share of the operations and the overlap on how a round of EAGLE-1 grows
# with the batch. A draft step's cost is an estimate from its kernels.
BANDWIDTH_SHARE = 0.82
LAYER_S = 26e-6
STEP_S = 0.5e-3
ALL_REDUCE_S = 12e-6
FLOP_SHARE = 0.5
OVERLAP_POWER = 2.0
DRAFT_STEP_S = 40e-6
FLOP_SHARES = (0.35, 0.7)  # between which it may well lie


def make_gpu(
    name: str,
    bytes_per_s: float,
    flops_per_s: float,
    memory_bytes: float,
    link_bytes_per_s: float,
    flop_share: float = FLOP_SHARE,
) -> Device:
    """Make a device of its maker's figures; operations are dense ones in bfloat16."""
    return Device(
        name,
        bytes_per_s=BANDWIDTH_SHARE * bytes_per_s,
        flops_per_s=flop_share * flops_per_s,
        memory_bytes=memory_bytes,
        layer_s=LAYER_S,
        step_s=STEP_S,
        draft_step_s=DRAFT_STEP_S,
        all_reduce_s=ALL_REDUCE_S,
        link_bytes_per_s=BANDWIDTH_SHARE * link_bytes_per_s,
        overlap_power=OVERLAP_POWER,
    )


# Source: NVIDIA's data sheets of the SXM boards and of the L4. With sparsity they name twice the
# operations; of NVLink they name both directions together. An L4 has none: PCIe 4.0, 16 lanes.
H100 = make_gpu("H100 SXM", 3.35e12, 989e12, 80e9, 450e9)
H200 = make_gpu("H200 SXM", 4.8e12, 989e12, 141e9, 450e9)
A100 = make_gpu("A100 80GB SXM", 2.039e12, 312e12, 80e9, 300e9)
L4 = make_gpu("L4", 0.3e12, 121e12, 24e9, 32e9)


def _make_config(
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int,
    head_dim: int = 128,
    is_tied: bool = False,
) -> Mapping[str, Any]:
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": vocab_size,
        "head_dim": head_dim,
        "tie_word_embeddings": is_tied,
    }


LLAMA_2_7B = _make_config(32, 4096, 11008, 32, 32, 32000)
LLAMA_2_13B = _make_config(40, 5120, 13824, 40, 40, 32000)
LLAMA_2_70B = _make_config(80, 8192, 28672, 64, 8, 32000)
LLAMA_3_1_8B = _make_config(32, 4096, 14336, 32, 8, 128256)
LLAMA_3_1_70B = _make_config(80, 8192, 28672, 64, 8, 128256)
LLAMA_3_2_1B = _make_config(16, 2048, 8192, 32, 8, 128256, head_dim=64, is_tied=True)
QWEN3_8B = _make_config(36, 4096, 12288, 32, 8, 151936)
