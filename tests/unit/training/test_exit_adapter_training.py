"""An exit adapter's training: only it moves, it learns what the model does, and it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from torch.nn import functional

from layerskip_vllm.checkpoint.exit_adapter import load_exit_adapter
from layerskip_vllm.checkpoint.validation import parse
from layerskip_vllm.tools.commands import main
from layerskip_vllm.training.decoder import capture_layer_outputs, find_decoder_parts
from layerskip_vllm.training.exit_adapter import AdaptedExit, ExitAdapterSettings
from tests.support import training
from tests.support.checkpoints import CONFIGS
from tests.support.training import (
    NUM_LAYERS,
    SMALL,
    assert_accumulation_changes_nothing,
    make_rows,
    small_config,
    step_logs,
    weights_equal,
)

SETTINGS = ExitAdapterSettings(rank=8, exit_layer=2)


def make_model() -> transformers.PreTrainedModel:
    """A random model that is sure of its choices, so that there is something to learn."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](**SMALL)).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.2)
        model.lm_head.weight.mul_(3)
    return model


def make_trainer(path: Path, settings: Any = SETTINGS, model: Any = None, **arguments: Any) -> Any:
    return training.make_trainer(path, settings, model or make_model(), **arguments)


def make_batch() -> dict[str, torch.Tensor]:
    rows = make_rows(4)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def read_exits(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Each layer's logits, by the model's own parts: `[batch_size, seq_len, vocab_size]`."""
    parts = find_decoder_parts(model)
    with torch.no_grad(), capture_layer_outputs(parts.layers, range(NUM_LAYERS)) as outputs:
        model(input_ids=batch["input_ids"])
        return [parts.compute_logits(outputs[i]) for i in range(NUM_LAYERS)]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("target", ["labels", "last_layer"])
def test_loss_is_the_plain_exits_when_the_adapter_is_untrained(architecture, target):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](**SMALL)).eval()
    batch = make_batch()
    *_, exit_logits, _, last_logits = read_exits(model, batch)
    settings = ExitAdapterSettings(rank=8, exit_layer=NUM_LAYERS - 2, target=target)
    loss = AdaptedExit(model, settings, seed=0)(**batch).loss

    is_label = batch["labels"][:, 1:] != -100
    targets = batch["labels"][:, 1:] if target == "labels" else last_logits[:, :-1].softmax(-1)
    expected = functional.cross_entropy(exit_logits[:, :-1][is_label], targets[is_label])
    torch.testing.assert_close(loss, expected)
    by_step = AdaptedExit(model, settings, seed=0)(**batch, num_items_in_batch=100).loss
    torch.testing.assert_close(by_step * 100, expected * is_label.sum())


@pytest.mark.parametrize(("target", "num_layers_run"), [("labels", 2), ("last_layer", NUM_LAYERS)])
def test_layers_run_as_far_as_the_target_needs(target, num_layers_run):
    model = make_model()
    ran = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    settings = ExitAdapterSettings(rank=8, exit_layer=2, target=target)
    AdaptedExit(model, settings, seed=0)(**make_batch()).loss.backward()
    assert ran == [False] * num_layers_run


@pytest.mark.parametrize("target", ["labels", "last_layer"])
def test_training_moves_the_adapter_alone(tmp_path, target):
    model = make_model()
    settings = ExitAdapterSettings(rank=8, exit_layer=2, num_speculative_tokens=5, target=target)
    trainer = make_trainer(tmp_path / "out", settings, model, max_steps=40)
    first = {name: weight.clone() for name, weight in trainer.adapter.state_dict().items()}
    trainer.train()
    trainer.save_model()

    assert weights_equal(model, make_model())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.training
    for name, weight in trainer.adapter.state_dict().items():
        assert not torch.equal(weight, first[name])
    losses = [entry["loss"] for entry in step_logs(trainer)]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.2
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"exit_adapter.json", "exit_adapter.safetensors"}
    saved = load_exit_adapter(tmp_path / "out")
    assert weights_equal(saved, trainer.adapter)
    assert (saved.config.exit_layer, saved.config.num_speculative_tokens) == (2, 5)
    assert (saved.config.hidden_size, saved.config.num_hidden_layers) == (32, NUM_LAYERS)


def test_exit_chooses_what_the_model_does_more_often_when_trained(tmp_path):
    model, batch = make_model(), make_batch()
    trainer = make_trainer(tmp_path, ExitAdapterSettings(rank=32, exit_layer=2), max_steps=40)
    trainer.train()
    exits = read_exits(model, batch)
    parts = find_decoder_parts(model)
    with torch.no_grad(), capture_layer_outputs(parts.layers, [1]) as outputs:
        model(input_ids=batch["input_ids"])
        adapted = model.lm_head(trainer.adapter(parts.norm(outputs[1])))
    chosen = exits[-1].argmax(-1)
    before = (exits[1].argmax(-1) == chosen).float().mean()
    after = (adapted.argmax(-1) == chosen).float().mean()
    assert after > before + 0.1


@pytest.mark.parametrize("target", ["labels", "last_layer"])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, target):
    settings = ExitAdapterSettings(rank=8, exit_layer=2, target=target)
    assert_accumulation_changes_nothing(make_trainer, tmp_path, settings)


def test_best_checkpoint_is_loaded_when_it_is_asked_for(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        learning_rate=10.0,  # so that the first is the best
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert best < 5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_adapter_is_trained_in_float32_when_the_model_is_in_bfloat16(tmp_path):
    losses = []
    for dtype, is_mixed in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        trainer = make_trainer(tmp_path, model=make_model().to(dtype), max_steps=10, bf16=is_mixed)
        trainer.train()
        losses.append([entry["loss"] for entry in step_logs(trainer)])
        assert {weight.dtype for weight in trainer.adapter.parameters()} == {torch.float32}
        assert losses[-1][-1] < losses[-1][0] - 0.1
    assert losses[0] != losses[1]
    assert losses[0] != losses[2]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[2] == pytest.approx(losses[0], abs=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be an integer of at least 1"),
        ({"rank": 33}, "rank is 33; it must be from 1 to 32, as the model has a hidden size of 32"),
        ({"rank": 8, "exit_layer": 0}, "exit_layer is 0; it must be an integer of at least 1"),
        ({"rank": 8, "exit_layer": 4}, "exit_layer is 4; it must be from 1 to 3"),
        ({"rank": 8, "num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
        ({"rank": 8, "target": "last"}, "target is 'last'; it must be one of labels, last_layer"),
    ],
)
def test_settings_are_refused_when_they_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptedExit(make_model(), parse(ExitAdapterSettings, settings), seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing is True; leave it out with"),
        ({"fsdp": True}, "fsdp is .*; leave it out with exit_adapter: each process holds"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0; leave it out"),
        ({"torch_compile": True}, "torch_compile is True; it must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1; it must be 0.0"),
    ],
)
def test_trainer_refuses_what_has_no_meaning_with_a_frozen_model(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **arguments)


def test_trainer_refuses_a_model_that_has_adapters_of_peft(tmp_path):
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"has peft's adapters.*merge_and_unload"):
        make_trainer(tmp_path, model=model)


def adapter_config(tmp_path: Path, checkpoint: Any, **changes: Any) -> dict[str, Any]:
    config = small_config(tmp_path, checkpoint)
    del config["layerskip"]
    return {**config, "exit_adapter": {"rank": 8, "exit_layer": 2}, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layerskip": {"max_drop_prob": 0.1}}, "layerskip and exit_adapter are both given"),
        (
            {"model": {"config": {"model_type": "llama"}, "tokenizer": "x"}},
            "model.path is None, and exit_adapter is given",
        ),
        ({"exit_adapter": {"e_scale": 0.2}}, "exit_adapter has the unknown key 'e_scale'; known"),
        ({"exit_adapter": {"rank": "8"}}, "exit_adapter.rank is '8'; it must be an integer"),
        ({"exit_adapter": {"rank": 0}}, "exit_adapter.rank is 0; it must be an integer of at"),
        ({"exit_adapter": {"rank": 65}}, "rank is 65; it must be from 1 to 64"),
    ],
)
def test_command_refuses_a_config_that_is_wrong(tmp_path, checkpoint, capsys, changes, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(adapter_config(tmp_path, checkpoint, **changes)))
    assert main(["train", str(path)]) == 2
    assert message in capsys.readouterr().err
