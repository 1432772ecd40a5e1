"""Layer dropout against the paper's formulas and against a loop over single samples."""

import contextlib

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip_vllm.checkpoint.validation import parse
from layerskip_vllm.training.layer_dropout import (
    LayerDropout,
    LayerDropoutSettings,
    depth_factor,
    time_factor,
)

NUM_LAYERS = 4
BATCH_SIZE, SEQ_LEN = 6, 5


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).train()


def make_batch() -> dict[str, torch.Tensor]:
    """Token ids with a padding mask and positions that differ by sample, so each is per sample."""
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(BATCH_SIZE, SEQ_LEN, dtype=torch.int64)
    attention_mask[1, :2] = 0
    attention_mask[4, :3] = 0
    return {
        "input_ids": torch.randint(32, (BATCH_SIZE, SEQ_LEN), generator=generator),
        "attention_mask": attention_mask,
        "position_ids": torch.arange(SEQ_LEN) + 7 * torch.arange(BATCH_SIZE)[:, None],
    }


class Doubling(nn.Module):
    """A layer whose output shows which samples it ran for."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * hidden_states


def test_depth_factor_doubles_over_the_depth_when_exponential():
    factors = [depth_factor("exponential", layer_idx, 5) for layer_idx in range(5)]

    assert factors == pytest.approx([0.0, 0.189207, 0.414214, 0.681793, 1.0], abs=1e-6)


def test_depth_factor_mean_is_the_papers_when_exponential_over_32_layers():
    factors = [depth_factor("exponential", layer_idx, 32) for layer_idx in range(32)]

    assert sum(factors) / 32 == pytest.approx(0.4445, abs=1e-4)


def test_depth_factor_rises_evenly_when_linear():
    assert [depth_factor("linear", i, 5) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_depth_factor_is_one_everywhere_when_constant():
    assert [depth_factor("constant", i, 3) for i in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0]),
        ("exponential", [0.0, 0.414214, 1.0]),
        ("decreasing", [1.0, 0.5, 0.0]),
    ],
)
def test_time_factor_follows_its_schedule_when_start_middle_end(schedule, expected):
    factors = [time_factor(schedule, step, 101) for step in (0, 50, 100)]

    assert factors == pytest.approx(expected, abs=1e-6)


def test_drop_prob_is_the_product_of_both_schedules_when_both_vary():
    config = LayerDropoutSettings(
        max_drop_prob=0.2, depth_schedule="linear", time_schedule="decreasing"
    )
    dropout = LayerDropout([nn.Identity() for _ in range(5)], config)

    dropout.set_step(4, num_steps=11)

    assert dropout.drop_prob(3) == pytest.approx(0.2 * 0.75 * 0.6)


def test_logits_and_gradients_are_equal_to_the_bit_when_prob_is_zero():
    results = []
    for is_on in (False, True):
        model = make_model()
        dropout = LayerDropout(
            model.model.layers, LayerDropoutSettings(max_drop_prob=0.0, rescale=True)
        )
        with dropout if is_on else contextlib.nullcontext():
            logits = model(**make_batch(), use_cache=False).logits
            logits.square().mean().backward()
        results.append([logits, *(weight.grad for weight in model.parameters())])

    assert all(torch.equal(plain, dropped) for plain, dropped in zip(*results, strict=True))


def test_logits_are_equal_to_the_bit_when_in_eval():
    model = make_model().eval()
    plain = model(**make_batch(), use_cache=False).logits
    config = LayerDropoutSettings(max_drop_prob=0.9, depth_schedule="constant")

    with LayerDropout(model.model.layers, config):
        assert torch.equal(model(**make_batch(), use_cache=False).logits, plain)


def test_logits_are_plain_again_after_the_with():
    model = make_model()
    plain = model(**make_batch(), use_cache=False).logits
    config = LayerDropoutSettings(max_drop_prob=0.9, depth_schedule="constant")
    with LayerDropout(model.model.layers, config):
        dropped = model(**make_batch(), use_cache=False).logits

    assert not torch.equal(dropped, plain)
    assert torch.equal(model(**make_batch(), use_cache=False).logits, plain)


def test_samples_are_unchanged_when_dropped():
    config = LayerDropoutSettings(max_drop_prob=0.5, depth_schedule="constant")
    layer = Doubling()
    hidden_states = torch.arange(1.0, 17.0).reshape(8, 1, 2)

    with LayerDropout([layer], config) as dropout:
        output = layer(hidden_states)

    kept = dropout.kept_samples(0, 8).tolist()
    assert 0 < len(kept) < 8
    for sample in range(8):
        factor = 2 if sample in kept else 1
        assert torch.equal(output[sample], factor * hidden_states[sample])


def test_kept_samples_are_scaled_by_the_keep_probability_when_rescaled():
    config = LayerDropoutSettings(max_drop_prob=0.75, depth_schedule="constant", rescale=True)
    layer = Doubling()
    with LayerDropout([layer], config) as dropout:
        output = layer(torch.ones(16, 1, 1)).flatten()

    kept = dropout.kept_samples(0, 16)
    assert 0 < len(kept) < 16
    # x + (2 x - x) / (1 - 0.75) = 5 x
    assert output[kept].tolist() == [5.0] * len(kept)
    assert output.sum() == 16 + 4 * len(kept)


def test_every_sample_is_scaled_when_rescaled_and_all_are_kept(monkeypatch):
    config = LayerDropoutSettings(max_drop_prob=0.5, depth_schedule="constant", rescale=True)
    layer = Doubling()
    dropout = LayerDropout([layer], config)
    monkeypatch.setattr(
        dropout, "kept_samples", lambda _layer, batch_size: torch.arange(batch_size)
    )
    with dropout:
        assert layer(torch.ones(3, 1, 1)).flatten().tolist() == [3.0, 3.0, 3.0]


def test_batch_equals_samples_run_alone_when_masks_and_positions_differ():
    """The oracle runs one sample at a time through the layers that kept it, and no others."""
    config = LayerDropoutSettings(max_drop_prob=0.5, depth_schedule="constant")
    model = make_model()
    batch = make_batch()
    dropout = LayerDropout(model.model.layers, config)
    kept = [dropout.kept_samples(i, BATCH_SIZE).tolist() for i in range(NUM_LAYERS)]
    assert all(0 < len(samples) < BATCH_SIZE for samples in kept)
    all_layers = model.model.layers
    expected = []
    for sample in range(BATCH_SIZE):
        chosen = [layer for i, layer in enumerate(all_layers) if sample in kept[i]]
        model.model.layers = nn.ModuleList(chosen)
        rows = {name: tensor[sample : sample + 1] for name, tensor in batch.items()}
        expected.append(model(**rows, use_cache=False).logits)
    model.model.layers = all_layers

    with dropout:
        logits = model(**batch, use_cache=False).logits

    is_token = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[is_token], torch.cat(expected)[is_token])


def test_draws_depend_on_seed_step_micro_batch_and_layer_and_repeat_when_asked_again():
    def draw(seed: int = 0, step: int = 0, micro_batch: int = 0, layer_idx: int = 0) -> list[int]:
        config = LayerDropoutSettings(max_drop_prob=0.5, depth_schedule="constant", seed=seed)
        dropout = LayerDropout([nn.Identity()] * 2, config)
        dropout.set_step(step, 10, micro_batch)
        return dropout.kept_samples(layer_idx, 64).tolist()

    draws = [draw(), draw(seed=1), draw(step=1), draw(micro_batch=1), draw(layer_idx=1)]

    assert draw() == draws[0]
    assert len({tuple(samples) for samples in draws}) == 5


def test_share_of_dropped_samples_is_the_probability_when_many_are_drawn():
    """False alarm below 1e-6: five standard deviations of 32,000 draws are 0.011."""
    config = LayerDropoutSettings(max_drop_prob=0.2, depth_schedule="constant")
    dropout = LayerDropout([nn.Identity()], config)
    num_kept = 0
    for step in range(500):
        dropout.set_step(step, num_steps=500)
        num_kept += len(dropout.kept_samples(0, 64))

    assert 1 - num_kept / 32_000 == pytest.approx(0.2, abs=0.0112)


def test_gradients_are_equal_when_activations_are_checkpointed():
    results = []
    for is_checkpointed in (False, True):
        model = make_model()
        config = LayerDropoutSettings(max_drop_prob=0.5, depth_schedule="constant")
        with LayerDropout(model.model.layers, config):
            if is_checkpointed:
                model.gradient_checkpointing_enable()
            model(**make_batch(), use_cache=False).logits.square().mean().backward()
            results.append([weight.grad for weight in model.parameters()])

    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_layer_gets_no_gradient_when_it_was_dropped_for_every_sample(monkeypatch):
    model = make_model()
    config = LayerDropoutSettings(max_drop_prob=0.5, depth_schedule="constant")
    dropout = LayerDropout(model.model.layers, config)
    monkeypatch.setattr(
        dropout,
        "kept_samples",
        lambda layer_idx, batch_size: torch.arange(0 if layer_idx == 2 else batch_size),
    )
    with dropout:
        model(**make_batch(), use_cache=False).logits.sum().backward()

    has_gradient = [layer.mlp.up_proj.weight.grad is not None for layer in model.model.layers]
    assert has_gradient == [True, True, False, True]


def test_forward_raises_when_a_kv_cache_is_in_use():
    model = make_model()
    config = LayerDropoutSettings(max_drop_prob=0.5, depth_schedule="constant")
    with (
        LayerDropout(model.model.layers, config),
        pytest.raises(ValueError, match="use_cache=False"),
    ):
        model(**make_batch(), use_cache=True)


def test_forward_raises_when_a_layer_returns_more_than_hidden_states():
    class Pair(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    layer = Pair()
    config = LayerDropoutSettings(max_drop_prob=0.5, depth_schedule="constant")
    with LayerDropout([layer], config), pytest.raises(TypeError, match="Pair returned tuple"):
        layer(torch.ones(8, 1, 1))


def test_dropout_is_refused_when_it_is_on_already():
    with (
        LayerDropout([Doubling()], LayerDropoutSettings()) as dropout,
        pytest.raises(RuntimeError, match="is on already"),
        dropout,
    ):
        pass


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_drop_prob", 1.0),
        ("max_drop_prob", -0.1),
        ("depth_schedule", "quadratic"),
        ("time_schedule", "linear"),
    ],
)
def test_config_names_the_field_and_value_when_invalid(field, value):
    with pytest.raises(ValueError, match=f"^{field} is .*{value}.*; it must be"):
        parse(LayerDropoutSettings, {field: value})
