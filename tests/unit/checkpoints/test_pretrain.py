"""The checkpoint that the repository carries: how it is made, and that it is what that makes."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from checkpoints.stdlib.pretrain import learning_rate_factor, train_in_place
from checkpoints.stdlib.pretrain_config import PretrainConfig, parse_args
from checkpoints.stdlib.small_model import (
    build_model,
    grow,
    save_checkpoint,
    train_tokenizer,
)

CHECKPOINT = Path("checkpoints/stdlib-24l")
SMALL = PretrainConfig(
    num_steps=8,
    num_growth_steps=3,
    num_first_layers=2,
    tokens_per_step=64,
    seq_len=16,
    long_seq_len=32,
    num_long_steps=2,
    num_warmup_steps=2,
    num_decay_steps=3,
    vocab_size=300,
    num_layers=4,
    hidden_size=32,
    intermediate_size=64,
    max_drop_prob=0.5,
    min_exit_layer=1,
    num_distill_steps=2,
    exit_layer=1,
)


def make_trained(config: PretrainConfig) -> transformers.LlamaForCausalLM:
    token_ids = torch.randint(300, (2000,), generator=torch.Generator().manual_seed(7))
    model = build_model(config, eos_token_id=0)
    train_in_place(model, token_ids, config)
    return model


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


@pytest.fixture(scope="module")
def trained() -> transformers.LlamaForCausalLM:
    return make_trained(SMALL)


def test_run_makes_the_same_weights_when_repeated(trained):
    assert same_weights(trained, make_trained(SMALL))


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"recipe": False}, {"max_drop_prob": 0.0}, {"distill_scale": 1.0}],
    ids=str,
)
def test_run_makes_other_weights_when_a_setting_is_another(trained, change):
    assert not same_weights(trained, make_trained(SMALL.model_copy(update=change)))


def test_later_layers_are_scaled_copies_when_the_model_grows():
    model = build_model(SMALL, eos_token_id=0)
    grow(model, SMALL)
    for first, later in zip(model.model.layers[:2], model.model.layers[2:], strict=True):
        assert torch.equal(later.self_attn.q_proj.weight, first.self_attn.q_proj.weight)
        scaled = SMALL.growth_scale * first.mlp.down_proj.weight
        assert torch.equal(later.mlp.down_proj.weight, scaled)


def test_learning_rate_rises_twice_and_falls_to_nothing_when_the_model_grows():
    factors = [learning_rate_factor(step, SMALL) for step in range(SMALL.num_steps + 1)]
    assert factors[:6] == [0.5, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert factors[6:] == pytest.approx([2 / 3, 1 / 3, 0.0])


def test_checkpoint_says_how_it_drafts_and_loads_when_saved(tmp_path, trained):
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 9, 300, max_length=32)
    save_checkpoint(tmp_path, trained, tokenizer, {"made": "here"})
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.layerskip == {"exit_layer": 1, "num_speculative_tokens": 4}
    assert same_weights(trained, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x): # ünïcode\n"
    assert loaded.decode(loaded.encode(text)) == text
    assert json.loads((tmp_path / "training.json").read_text()) == {"made": "here"}


def test_carried_checkpoint_is_what_the_command_makes_by_default():
    """Its card gives the command without options."""
    report = json.loads((CHECKPOINT / "training.json").read_text())
    out, config = parse_args(["--out", str(CHECKPOINT)])
    assert (out, config.model_dump()) == (CHECKPOINT, report["config"])
