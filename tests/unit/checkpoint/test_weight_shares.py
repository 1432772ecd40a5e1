"""What a draft step reads: shares made of sizes, and layers found in weights' names."""

from __future__ import annotations

import pytest

from layerskip_vllm.checkpoint.weight_shares import WeightShares, layer_of_weight


def test_shares_are_parts_of_all_layers_and_the_head_when_made_of_sizes() -> None:
    shares = WeightShares.from_sizes([10, 20, 30, 20], head=20, exit_layer=2, adapter=5)
    assert shares == WeightShares(layers=0.3, head=0.2, adapter=0.05)
    assert shares.total == pytest.approx(0.55)
    assert shares.with_draft_vocab(0.25).total == pytest.approx(0.4)
    assert WeightShares.from_sizes([10, 20, 30, 20], head=20, exit_layer=4).total == 1


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12),
        ("layers.0.norm.weight", 0),
        ("transformer.h.7.attn.bias", 7),
        ("gpt_neox.blocks.3.mlp.weight", 3),
        ("transformer.block.3.mlp.weight", 3),
        ("model.layers.4.experts.5.w1.weight", 4),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.sublayers.1.weight", None),
        ("model.layers.norm.weight", None),
    ],
)
def test_layer_is_found_in_the_name_of_a_weight(name: str, layer: int | None) -> None:
    assert layer_of_weight(name) == layer
