"""Exits and layer dropout on the architectures of transformers, against truncated models."""

from __future__ import annotations

import contextlib
import math

import peft
import pytest
import torch
import transformers
from torch import nn

from layerskip_vllm.training.decoder import find_decoder_parts, replace_forward
from layerskip_vllm.training.layer_skip import LayerSkip
from layerskip_vllm.training.settings import LayerSkipSettings
from tests.support.checkpoints import CONFIGS, VOCAB_SIZE

NUM_LAYERS, BATCH_SIZE, SEQ_LEN = 4, 4, 12
SMALL = {"num_hidden_layers": NUM_LAYERS, "hidden_size": 32, "intermediate_size": 48}
ARCHITECTURES = ["llama", "llama-tied", "qwen3", "gemma2", "olmo2", "mistral", "phi3", "gpt2"]
ALL_EXITS = LayerSkipSettings(
    max_drop_prob=0.0, e_scale=1.0, exit_scale="flat", curriculum="none", recompute_logits=False
)


def make_model(architecture: str, lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if architecture == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=32, n_layer=NUM_LAYERS, n_head=2, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    else:
        # A cap so low that an exit without it has another loss.
        cap = {"final_logit_softcapping": 0.5} if architecture == "gemma2" else {}
        config = CONFIGS[architecture](**SMALL, **cap)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.normal_(1.0, 0.3)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.1)
    return model.train()


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(2, VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN), generator=generator)
    labels = token_ids.clone()
    labels[0, :3] = -100
    attention_mask = torch.ones_like(token_ids)
    labels[1, -4:], attention_mask[1, -4:] = -100, 0
    return {"input_ids": token_ids, "labels": labels, "attention_mask": attention_mask}


def layers_of(model: nn.Module) -> nn.ModuleList:
    return find_decoder_parts(model).layers


def record_first_norm(layer: nn.Module) -> list[torch.Tensor]:
    """A list that fills up with what a layer's norms, or sublayers in OLMo 2, see first."""
    seen: list[torch.Tensor] = []
    module = next(m for m in layer.modules() if isinstance(m, nn.Linear) or "Norm" in repr(type(m)))
    module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    return seen


def truncated_loss(model: nn.Module, num_layers: int) -> float:
    """The model's own loss when it has its first layers alone."""
    batch = make_batch()
    decoder = find_decoder_parts(model).model.get_decoder()
    name = "h" if hasattr(decoder, "h") else "layers"
    all_layers = getattr(decoder, name)
    setattr(decoder, name, all_layers[:num_layers])
    try:
        return model(**batch, use_cache=False).loss.item()
    finally:
        setattr(decoder, name, all_layers)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_exits_loss_is_that_of_the_truncated_model_when_all_are_on(architecture, lora):
    model = make_model(architecture, lora)
    expected = {e: truncated_loss(model, e) for e in range(1, NUM_LAYERS + 1)}

    with LayerSkip(model, ALL_EXITS) as layer_skip:
        loss = model(**make_batch()).loss

    losses = {e: exit_loss.item() for e, exit_loss in layer_skip.exit_losses.items()}
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 5) for value in losses.values()}) == NUM_LAYERS
    assert loss.item() == pytest.approx(sum(expected.values()) / NUM_LAYERS, rel=1e-5)


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_plain_to_the_bit_when_p_and_e_scale_are_zero(
    architecture, lora, is_checkpointed
):
    results = []
    for is_on in (False, True):
        model = make_model(architecture, lora)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        settings = LayerSkipSettings(max_drop_prob=0.0, e_scale=0.0, rotation=4)
        with LayerSkip(model, settings) if is_on else contextlib.nullcontext():
            loss = model(**make_batch(), num_items_in_batch=40).loss
            loss.backward()
        results.append([loss, *(weight.grad for weight in model.parameters())])

    for plain, off in zip(*results, strict=True):
        assert (plain is None) == (off is None)
        assert plain is None or torch.equal(plain, off)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_last_block_has_a_gradient_when_exits_rotate(architecture, lora):
    model = make_model(architecture, lora)
    with LayerSkip(model, LayerSkipSettings(max_drop_prob=0.0, rotation=3)):
        model(**make_batch()).loss.backward()

    gradients = [weight.grad for weight in layers_of(model)[-1].parameters()]
    assert max(gradient.abs().max() for gradient in gradients if gradient is not None) > 0


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_samples_are_dropped_in_both_passes_when_checkpointed(architecture, lora):
    """The layers' first norms see the same inputs twice, and gradients are those without it."""
    settings = LayerSkipSettings(
        max_drop_prob=0.5, depth_schedule="constant", e_scale=1.0, curriculum="none"
    )
    gradients, inputs = [], []
    for is_checkpointed in (False, True):
        model = make_model(architecture, lora)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with LayerSkip(model, settings) as layer_skip:
            layer_skip.set_step(1, num_steps=1, micro_batch=2)
            inputs.append([record_first_norm(layer) for layer in layers_of(model)])
            model(**make_batch()).loss.backward()
            gradients.append([weight.grad for weight in model.parameters()])

    assert any(0 < len(tensors[0]) < BATCH_SIZE for tensors in inputs[0] if tensors)
    for once, twice in zip(*inputs, strict=True):
        assert len(twice) == 2 * len(once)
        assert all(torch.equal(tensor, once[0]) for tensor in twice)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_model_is_plain_when_in_eval_or_after_the_with():
    model = make_model("gemma2")
    batch = make_batch()
    plain = model(**batch)
    settings = LayerSkipSettings(max_drop_prob=0.9, depth_schedule="constant", rotation=2)
    with LayerSkip(model, settings):
        trained = model(**batch)
        results = [model.eval()(**batch)]
    model.train()
    results.append(model(**batch))

    assert trained.logits is None
    assert not torch.equal(trained.loss, plain.loss)
    assert all(torch.equal(result.loss, plain.loss) for result in results)
    assert all(torch.equal(result.logits, plain.logits) for result in results)
    assert "forward" not in model.__dict__


def test_model_is_plain_after_the_with_when_another_wrapped_its_forward():
    """As accelerate's autocast does; a second `with` must not wrap it twice."""
    model = make_model("llama")
    plain = model(**make_batch()).loss
    with LayerSkip(model, ALL_EXITS) as layer_skip:
        inner, calls = model.forward, []
        model.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)

    assert torch.equal(model(**make_batch()).loss, plain)
    with layer_skip:
        assert not torch.equal(model(**make_batch()).loss, plain)
    assert len(layer_skip.exit_losses) == NUM_LAYERS
    assert len(calls) == 2


def test_replaced_forward_comes_back_when_undone():
    module = nn.Linear(1, 1)
    undo_first = replace_forward(module, lambda x: x + 1)
    undo_second = replace_forward(module, lambda x: x + 2)

    assert module(0) == 2
    undo_second()
    assert module(0) == 1
    undo_first()
    assert "forward" not in module.__dict__


def test_training_is_refused_when_checkpointing_is_reentrant():
    model = make_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})

    with LayerSkip(model, ALL_EXITS), pytest.raises(ValueError, match="use_reentrant is not false"):
        model(**make_batch())


def test_model_is_refused_when_its_experts_have_a_loss():
    config = CONFIGS["mixtral"](**SMALL, output_router_logits=True)
    model = transformers.AutoModelForCausalLM.from_config(config)

    with pytest.raises(ValueError, match="output_router_logits is true"):
        LayerSkip(model, ALL_EXITS)


def test_dropout_is_refused_when_attention_is_flex():
    config = CONFIGS["llama"](**SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, BATCH_SIZE, None, 128, 128, device="cpu")
    settings = LayerSkipSettings(max_drop_prob=0.5, depth_schedule="constant", rotation=4)
    with LayerSkip(model, settings), pytest.raises(ValueError, match="flex attention"):
        layers_of(model)[0].train()(torch.zeros(BATCH_SIZE, SEQ_LEN, 32), attention_mask=mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear has no decoder layers"),
        (
            lambda: transformers.BertModel(
                transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
            ),
            "BertModel has no decoder layers",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
            ),
            "T5ForConditionalGeneration has an encoder too",
        ),
        (
            lambda: transformers.LlamaModel(CONFIGS["llama"](**SMALL)),
            "LlamaModel has no head",
        ),
    ],
)
def test_find_decoder_parts_names_what_is_missing_when_a_model_is_no_decoder(make, message):
    with pytest.raises(ValueError, match=message):
        find_decoder_parts(make())


def test_loss_is_that_of_uniform_guesses_when_logits_are_capped_to_almost_nothing():
    """Gemma 2 caps its logits in `forward`, after the head: an exit must not go around that."""
    model = make_model("gemma2")
    find_decoder_parts(model).model.config.final_logit_softcapping = 1e-4

    with LayerSkip(model, ALL_EXITS) as layer_skip:
        model(**make_batch())

    for exit_loss in layer_skip.exit_losses.values():
        assert exit_loss.item() == pytest.approx(math.log(VOCAB_SIZE), rel=1e-3)
