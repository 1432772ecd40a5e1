"""Exits through the model's own head, against models that are cut off after E layers."""

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from layerskip_vllm.training.exit_head import ExitHead

NUM_LAYERS = 3
SHAPE = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TOKEN_IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def make_model(model_class: type, config_class: type, **config: float) -> nn.Module:
    torch.manual_seed(0)
    return model_class(config_class(**SHAPE | config)).eval()


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize(
    ("model_class", "config_class", "config"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        # So low that it bends every logit.
        (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 0.5}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
        (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 2}),
    ],
    ids=["llama", "gemma2", "granite", "mixtral"],
)
@torch.inference_mode()
def test_logits_are_those_of_a_model_cut_off_there_when_it_has_its_own_way_to_logits(
    model_class, config_class, config, exit_layer
):
    model = make_model(model_class, config_class, **config)
    head = ExitHead(model)
    logits = head.logits(head.run_layers(TOKEN_IDS)[exit_layer - 1][0])
    plain = head.parts.head(head.parts.norm(head.run_layers(TOKEN_IDS)[exit_layer - 1][0]))

    model.config.num_hidden_layers = exit_layer
    model.model.layers = model.model.layers[:exit_layer]
    expected = model(TOKEN_IDS, use_cache=False).logits[0]

    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(plain, expected, atol=1e-2) == (not config or "num_local" in str(config))


def test_model_is_as_before_when_an_exit_was_read():
    model = make_model(LlamaForCausalLM, LlamaConfig)
    with torch.inference_mode():
        expected = model(TOKEN_IDS, use_cache=False).logits
        ExitHead(model).logits(torch.ones(2, 16))

        assert torch.equal(model(TOKEN_IDS, use_cache=False).logits, expected)


def test_model_is_refused_when_more_than_the_norm_comes_after_its_layers():
    class Doubled(LlamaModel):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state *= 2
            return output

    class DoubledForCausalLM(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model = Doubled(config)

    with pytest.raises(
        ValueError, match=r"model is a DoubledForCausalLM, whose logits are not its last"
    ):
        ExitHead(make_model(DoubledForCausalLM, LlamaConfig))


@torch.inference_mode()
def test_exit_is_that_of_the_model_cut_off_when_its_parts_are_named_as_gpt2s_are():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=16, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    head = ExitHead(model)
    logits = head.logits(head.run_layers(TOKEN_IDS)[0][0])

    model.transformer.h = model.transformer.h[:1]
    assert torch.allclose(logits, model(TOKEN_IDS, use_cache=False).logits[0], atol=1e-5)
