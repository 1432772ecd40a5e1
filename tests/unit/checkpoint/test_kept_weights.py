"""Which weights of a checkpoint belong to its first layers."""

import pytest
import torch

from layerskip_vllm.checkpoint.first_layers import keep_first_layers

EXIT_LAYER = 3


@pytest.mark.parametrize(
    ("name", "is_kept"),
    [
        ("model.layers.2.mlp.experts.7.w1.weight", True),
        ("model.layers.3.input_layernorm.weight", False),
        ("model.layers.13.mlp.experts.0.w1.weight", False),
        ("transformer.h.3.attn.c_attn.weight", False),
        ("layers.2.self_attn.q_proj.weight", True),
        ("model.embed_tokens.weight", True),
        ("lm_head.weight", True),
    ],
)
def test_weight_is_kept_when_its_layer_is_among_the_first(name, is_kept):
    kept = list(keep_first_layers([(name, torch.empty(0))], EXIT_LAYER))
    assert bool(kept) == is_kept
