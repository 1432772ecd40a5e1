"""Early exit loss against weights worked by hand and against a plain sum over exits."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip_vllm.training.decoder import capture_layer_outputs, find_decoder_parts
from layerskip_vllm.training.early_exit_loss import (
    EarlyExitLoss,
    exit_scales,
    exit_shares,
    is_exit_on,
)

NUM_LAYERS, VOCAB_SIZE = 4, 32


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).train()
    with torch.no_grad():
        model.model.norm.weight.normal_(1.0, 0.5)
    return model


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    token_ids = torch.randint(VOCAB_SIZE, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = token_ids[:, 1:].clone()
    labels[0, :2] = -100
    return token_ids[:, :-1], labels


def compute(
    model: LlamaForCausalLM, early_exit_loss: EarlyExitLoss, step: int = 0
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    inputs, labels = make_batch()
    layers = early_exit_loss.active_layers(step, num_steps=1)
    with capture_layer_outputs(model.model.layers, layers) as outputs:
        model.model(input_ids=inputs, use_cache=False)
    return early_exit_loss.compute(outputs, labels)


def truncated_loss(model: LlamaForCausalLM, num_layers: int) -> float:
    """The loss of the model cut off after `num_layers` layers, token by token in plain Python."""
    inputs, labels = make_batch()
    all_layers = model.model.layers
    model.model.layers = nn.ModuleList(all_layers[:num_layers])
    logits = model(input_ids=inputs, use_cache=False).logits.tolist()
    model.model.layers = all_layers
    losses = [
        math.log(sum(math.exp(logit) for logit in row)) - row[label]
        for rows, sample_labels in zip(logits, labels.tolist(), strict=True)
        for row, label in zip(rows, sample_labels, strict=True)
        if label != -100
    ]
    return sum(losses) / len(losses)


def test_exit_scales_are_the_papers_when_worked_by_hand():
    scales = exit_scales(32, e_scale=0.2)

    assert [scales[i] for i in (0, 3, 7, 15, 23, 30)] == pytest.approx(
        [0.0, 1.2, 5.6, 24.0, 55.2, 93.0]
    )
    assert scales[31] == pytest.approx(124.0)


def test_exit_shares_are_the_papers_when_one_in_eight_rotates():
    shares = exit_shares(exit_scales(32, e_scale=0.2), [7, 15, 23, 31])

    percents = [round(100 * share, 1) for share in shares.values()]
    assert percents == [2.7, 11.5, 26.4, 59.4]


def test_exit_scales_are_the_last_layers_alone_when_e_scale_is_zero():
    assert exit_scales(4, e_scale=0.0) == [0.0, 0.0, 0.0, 3.0]


def test_exit_scales_are_even_when_flat():
    assert exit_scales(4, e_scale=0.5, kind="flat") == [0.5, 0.5, 0.5, 1.0]


def exits_on(curriculum: str, num_layers: int, step: int, num_steps: int = 1, rotation: int = 1):
    return [
        i
        for i in range(num_layers)
        if is_exit_on(curriculum, i, num_layers, step, num_steps, rotation)
    ]


def test_rotation_moves_up_by_one_layer_when_a_step_passes():
    active = [exits_on("rotational", 10, step, rotation=4) for step in range(5)]

    assert active == [[0, 4, 8, 9], [1, 5, 9], [2, 6, 9], [3, 7, 9], [0, 4, 8, 9]]


def test_gradual_curriculum_adds_a_layer_when_t_over_2l_steps_pass():
    assert [exits_on("gradual", 4, step, num_steps=80) for step in (0, 9, 10, 19, 20, 30, 79)] == [
        [3],
        [3],
        [2, 3],
        [2, 3],
        [1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]


def test_all_exits_are_on_at_any_step_without_a_curriculum():
    assert exits_on("none", 3, step=0) == exits_on("none", 3, step=9) == [0, 1, 2]


def test_each_exits_loss_is_that_of_the_truncated_model_when_all_are_on():
    """Layer l's exit is the model with layers 0..l, the final norm and the head, and no other."""
    model = make_model()
    early_exit_loss = EarlyExitLoss(find_decoder_parts(model), exit_scales(NUM_LAYERS, 1.0, "flat"))

    _, losses = compute(model, early_exit_loss)

    expected = {i: truncated_loss(model, i + 1) for i in range(NUM_LAYERS)}
    assert {i: loss.item() for i, loss in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_loss_is_the_weighted_mean_when_several_exits_are_on():
    model = make_model()
    early_exit_loss = EarlyExitLoss(find_decoder_parts(model), exit_scales(NUM_LAYERS, 0.2))

    loss, losses = compute(model, early_exit_loss)

    # e = 0, 0.2, 0.6 and 3 + 0.2 * (0 + 1 + 2) = 3.6
    expected = (0.2 * losses[1] + 0.6 * losses[2] + 3.6 * losses[3]) / 4.4
    assert list(losses) == [1, 2, 3]
    assert loss.item() == pytest.approx(expected.item())


def test_loss_is_the_models_own_when_e_scale_is_zero():
    model = make_model()
    early_exit_loss = EarlyExitLoss(find_decoder_parts(model), exit_scales(NUM_LAYERS, 0.0))

    loss, losses = compute(model, early_exit_loss)

    assert list(losses) == [NUM_LAYERS - 1]
    assert loss.item() == pytest.approx(truncated_loss(model, NUM_LAYERS), rel=1e-5)


@pytest.mark.parametrize("curriculum", ["none", "rotational"])
def test_last_layer_has_a_gradient_when_exits_are_on(curriculum):
    model = make_model()
    early_exit_loss = EarlyExitLoss(
        find_decoder_parts(model), exit_scales(NUM_LAYERS, 1.0), curriculum, rotation=3
    )

    compute(model, early_exit_loss)[0].backward()

    gradient = model.model.layers[-1].mlp.down_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_layers_above_an_exit_get_nothing_from_it_when_it_alone_counts():
    model = make_model()
    parts = find_decoder_parts(model)
    early_exit_loss = EarlyExitLoss(parts, [0.0, 1.0, 0.0, 0.0])

    compute(model, early_exit_loss)[0].backward()

    gradients = [layer.mlp.down_proj.weight.grad for layer in model.model.layers]
    assert [gradient.abs().max().item() > 0 for gradient in gradients] == [True, True, False, False]


def last_layer_loss(model: LlamaForCausalLM, target: str, **settings: bool):
    """The loss of exit 2 of 4 and of the last layer, weighted 3 to 1."""
    scales = [0.0, 3.0, 0.0, 1.0]
    parts = find_decoder_parts(model)
    return EarlyExitLoss(parts, scales, target=target, **settings)


def test_exit_loss_is_towards_the_last_layer_when_that_is_its_target():
    """By hand: minus the sum over all tokens of p_last * log p_exit, where there is a label."""
    model = make_model()
    inputs, labels = make_batch()
    total, losses = compute(model, last_layer_loss(model, "last_layer"))

    with torch.no_grad():
        outputs = model(inputs, output_hidden_states=True)
        p_last = outputs.logits.softmax(-1)
        log_p_exit = model.lm_head(model.model.norm(outputs.hidden_states[2])).log_softmax(-1)
        by_token = -(p_last * log_p_exit).sum(-1)
    expected = by_token[labels != -100].mean()
    torch.testing.assert_close(losses[1], expected)
    torch.testing.assert_close(losses[3], torch.tensor(truncated_loss(model, NUM_LAYERS)))
    torch.testing.assert_close(total.detach(), 0.75 * losses[1] + 0.25 * losses[3])
    assert abs(losses[1].item() - truncated_loss(model, 2)) > 1e-3


@pytest.mark.parametrize("recompute_logits", [False, True])
def test_last_layer_learns_nothing_from_its_exits_when_it_is_their_target(recompute_logits):
    model = make_model()
    early_exit_loss = last_layer_loss(model, "last_layer", recompute_logits=recompute_logits)
    early_exit_loss.scales[-1] = 0.0

    compute(model, early_exit_loss)[0].backward()

    gradients = [layer.mlp.down_proj.weight.grad for layer in model.model.layers]
    assert [gradient.abs().max().item() > 0 for gradient in gradients] == [True, True, False, False]


def test_active_layers_leave_out_what_is_not_asked_for_when_exit_layers_are_given():
    early_exit_loss = EarlyExitLoss(
        find_decoder_parts(make_model()),
        exit_scales(NUM_LAYERS, 1.0, "flat"),
        exit_layers=[1],
    )

    assert early_exit_loss.active_layers(0, num_steps=1) == [1, 3]


def test_gradients_are_equal_when_logits_are_recomputed():
    results = []
    for recompute_logits in (False, True):
        model = make_model()
        early_exit_loss = EarlyExitLoss(
            find_decoder_parts(model),
            exit_scales(NUM_LAYERS, 1.0),
            recompute_logits=recompute_logits,
        )
        compute(model, early_exit_loss)[0].backward()
        results.append([weight.grad for weight in model.parameters()])

    for kept, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_logits_are_not_kept_for_the_backward_pass_when_recomputed():
    def kept_logits(recompute_logits: bool) -> int:
        model = make_model()
        parts = find_decoder_parts(model)
        early_exit_loss = EarlyExitLoss(
            parts, [1.0] * NUM_LAYERS, recompute_logits=recompute_logits
        )
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            compute(model, early_exit_loss)
        # What cross-entropy saves has one row for each of the 3 * 6 tokens.
        return len({tensor.data_ptr() for tensor in saved if tensor.shape == (18, VOCAB_SIZE)})

    assert kept_logits(recompute_logits=False) == NUM_LAYERS
    assert kept_logits(recompute_logits=True) == 0


def test_capture_removes_its_hooks_when_done():
    model = make_model()
    with capture_layer_outputs(model.model.layers, [0]) as outputs:
        model.model(input_ids=make_batch()[0], use_cache=False)
    assert list(outputs) == [0]
    outputs.clear()

    model.model(input_ids=make_batch()[0], use_cache=False)

    assert not outputs


def test_loss_is_divided_by_the_labels_of_all_micro_batches_when_their_number_is_given():
    model = make_model()
    early_exit_loss = EarlyExitLoss(find_decoder_parts(model), exit_scales(NUM_LAYERS, 1.0))
    inputs, labels = make_batch()
    with capture_layer_outputs(model.model.layers, range(NUM_LAYERS)) as outputs:
        model.model(input_ids=inputs, use_cache=False)

    whole, _ = early_exit_loss.compute(outputs, labels)
    num_labels = (labels != -100).sum()
    halves = [
        early_exit_loss.compute(
            {i: output[rows] for i, output in outputs.items()}, labels[rows], num_labels
        )[0]
        for rows in (slice(0, 1), slice(1, 3))
    ]

    torch.testing.assert_close(halves[0] + halves[1], whole)
