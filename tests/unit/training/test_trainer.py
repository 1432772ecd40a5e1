"""LayerSkipTrainer against the plain Trainer and against itself, uninterrupted and in one batch."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

from layerskip_vllm.training.layer_dropout import LayerDropout
from layerskip_vllm.training.settings import LayerSkipSettings
from layerskip_vllm.training.trainer import LayerSkipTrainer
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.training import (
    NUM_LAYERS,
    assert_accumulation_changes_nothing,
    make_args,
    make_model,
    make_trainer,
    step_logs,
    weights_equal,
)

RECIPE = LayerSkipSettings(
    max_drop_prob=0.5, time_schedule="exponential", e_scale=1.0, rotation=3, exit_layer=2
)


OFF = LayerSkipSettings(max_drop_prob=0.0, e_scale=0.0, rotation=4)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_is_plain_to_the_bit_when_p_and_e_scale_are_zero(tmp_path, accumulation):
    trainers = [
        make_trainer(tmp_path, settings, gradient_accumulation_steps=accumulation, weight_decay=0.1)
        for settings in (None, OFF)
    ]
    for trainer in trainers:
        trainer.train()

    plain, off = (step_logs(trainer) for trainer in trainers)
    assert [entry["loss"] for entry in off] == [entry["loss"] for entry in plain]
    assert [entry["grad_norm"] for entry in off] == [entry["grad_norm"] for entry in plain]
    assert all(
        entry[f"loss_exit_{NUM_LAYERS}"] == pytest.approx(entry["loss"], rel=1e-5) for entry in off
    )
    assert weights_equal(trainers[0].model, trainers[1].model)
    assert not weights_equal(trainers[0].model, make_model())


def test_logs_have_the_active_exits_whose_weighted_sum_is_the_loss(tmp_path):
    settings = LayerSkipSettings(
        max_drop_prob=0.3, e_scale=0.5, exit_scale="flat", rotation=3, exit_layers=(1, 2)
    )
    trainer = make_trainer(tmp_path, settings, gradient_accumulation_steps=2)
    trainer.train()

    logs = step_logs(trainer)
    exits = [
        sorted(int(key.rpartition("_")[2]) for key in entry if "exit" in key) for entry in logs
    ]
    assert exits == [[1, 4], [2, 4], [4], [1, 4], [2, 4], [4]]
    for entry, (*early, last) in zip(logs, exits, strict=True):
        parts = [0.5 * entry[f"loss_exit_{e}"] for e in early] + [entry[f"loss_exit_{last}"]]
        assert entry["loss"] == pytest.approx(sum(parts) / (1 + 0.5 * len(early)), rel=1e-5)


def test_logs_have_each_exits_mean_over_its_own_steps_when_logged_less_often(tmp_path):
    def train(logging_steps: int) -> list[dict[str, float]]:
        trainer = make_trainer(tmp_path, RECIPE, logging_steps=logging_steps)
        trainer.train()
        return step_logs(trainer)

    by_step, (whole,) = train(1), train(6)
    for exit_layer in (2, 3, 4):
        key = f"loss_exit_{exit_layer}"
        losses = [entry[key] for entry in by_step if key in entry]
        assert len(losses) == (6 if exit_layer == 4 else 2)
        assert whole[key] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_gradual_curriculum_knows_the_length_of_the_training(tmp_path):
    settings = LayerSkipSettings(
        max_drop_prob=0.0, e_scale=1.0, exit_scale="flat", curriculum="gradual"
    )
    trainer = make_trainer(tmp_path, settings, max_steps=8)
    trainer.train()

    exits = [sum("exit" in key for key in entry) for entry in step_logs(trainer)]
    assert exits == [1, 2, 3, 4, 4, 4, 4, 4]  # one more every T / (2 L) = 1 steps


def test_layer_dropout_knows_the_length_of_the_training(tmp_path, monkeypatch):
    probs = []
    drop_prob = LayerDropout.drop_prob

    def record(self: LayerDropout, layer_idx: int) -> float:
        prob = drop_prob(self, layer_idx)
        if layer_idx == NUM_LAYERS - 1:
            probs.append(prob)
        return prob

    monkeypatch.setattr(LayerDropout, "drop_prob", record)
    settings = LayerSkipSettings(
        max_drop_prob=0.5, time_schedule="decreasing", e_scale=0.0, rotation=4
    )
    make_trainer(tmp_path, settings, max_steps=6).train()

    # By step, without repetitions: a layer asks more than once.
    assert list(dict.fromkeys(probs)) == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


@pytest.mark.parametrize("target", ["labels", "last_layer"])
def test_accumulated_gradients_are_those_of_one_batch_when_nothing_is_dropped(tmp_path, target):
    settings = LayerSkipSettings(max_drop_prob=0.0, e_scale=1.0, rotation=2, target=target)
    assert_accumulation_changes_nothing(make_trainer, tmp_path, settings)


def test_micro_batches_have_draws_of_their_own_when_accumulated(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, RECIPE, max_steps=2, gradient_accumulation_steps=3)
    steps = []
    set_step = trainer.layer_skip.set_step
    monkeypatch.setattr(
        trainer.layer_skip, "set_step", lambda *args: (steps.append(args), set_step(*args))
    )

    trainer.train()

    assert steps == [
        (0, 2, 0),
        (0, 2, 1),
        (0, 2, 2),
        (1, 2, 0),
    ]  # 16 rows are 4 micro-batches: 3 and 1


def test_evaluation_is_the_plain_models_when_training(tmp_path):
    trainer = make_trainer(tmp_path, RECIPE, eval_strategy="steps", eval_steps=3)
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    plain = make_trainer(tmp_path, None, model=trainer.model).evaluate()

    assert len(evaluated) == 2
    assert evaluated[-1]["eval_loss"] == plain["eval_loss"]
    assert not any("exit" in key for entry in evaluated for key in entry)


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_model_is_plain_when_training_has_ended(tmp_path, is_interrupted):
    trainer = make_trainer(tmp_path, RECIPE)
    if is_interrupted:
        trainer.train_dataset = [{"input_ids": torch.tensor([VOCAB_SIZE])}]
        with pytest.raises(IndexError):
            trainer.train()
    else:
        trainer.train()
    trainer.model.train()
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}

    outputs = [trainer.model(**batch, labels=batch["input_ids"]) for _ in range(2)]

    assert outputs[0].logits is not None
    assert torch.equal(outputs[0].loss, outputs[1].loss)


def test_bfloat16_and_checkpointing_train_when_they_are_on(tmp_path):
    losses = []
    for is_on in (False, True):
        trainer = make_trainer(
            tmp_path, RECIPE, bf16=is_on, gradient_checkpointing=is_on, max_steps=12
        )
        trainer.train()
        losses.append([entry["loss"] for entry in step_logs(trainer)])

    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_checkpoint_is_plain_and_names_its_exit_when_saved(tmp_path):
    trainer = make_trainer(tmp_path, RECIPE)
    trainer.train()
    trainer.save_model(tmp_path / "out")

    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["layerskip"] == {"exit_layer": 2, "num_speculative_tokens": 4}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert weights_equal(loaded, trainer.model)


def test_adapters_alone_are_trained_when_the_model_has_lora(tmp_path):
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    trainer = make_trainer(tmp_path, RECIPE, model=model)
    trainer.train()

    assert "loss_exit_2" in {key for entry in step_logs(trainer) for key in entry}
    moved = [
        name
        for name, weight in model.named_parameters()
        if "lora_B" in name and weight.abs().max() > 0
    ]
    assert len(moved) == 7 * NUM_LAYERS
    assert model.get_base_model().config.layerskip["exit_layer"] == 2
    merged = model.merge_and_unload()
    base = make_model().state_dict()
    assert torch.equal(merged.state_dict()["model.norm.weight"], base["model.norm.weight"])


def test_forward_that_goes_around_layerskip_is_refused_when_training(tmp_path):
    trainer = make_trainer(tmp_path, RECIPE)

    class Replace(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.forward = type(model).forward.__get__(model)

    trainer.add_callback(Replace())
    with pytest.raises(RuntimeError, match="did not come through LayerSkip"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "others", "message"),
    [
        ({"torch_compile": True}, {}, "torch_compile is True; it must be False"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor is 0.1; it must be 0.0"),
        ({}, {"compute_loss_func": len}, "compute_loss_func is given"),
        ({}, {"model_init": make_model}, "model_init is given"),
    ],
)
def test_trainer_refuses_what_would_replace_the_loss(tmp_path, arguments, others, message):
    with pytest.raises(ValueError, match=message):
        LayerSkipTrainer(make_model(), make_args(tmp_path, **arguments), RECIPE, **others)


def test_trainer_refuses_settings_that_do_not_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match="rotation is 8; it must be from 1 to 4"):
        make_trainer(tmp_path, LayerSkipSettings())
