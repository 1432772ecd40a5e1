"""Small models, rows and trainers for the tests of training; nothing here imports vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from layerskip_vllm.checkpoint.validation import parse
from layerskip_vllm.training.exit_adapter import ExitAdapterSettings, ExitAdapterTrainer
from layerskip_vllm.training.run import prepare, train
from layerskip_vllm.training.run_config import RunConfig
from layerskip_vllm.training.settings import LayerSkipSettings
from layerskip_vllm.training.trainer import LayerSkipTrainer
from tests.support.checkpoints import CONFIGS, VOCAB_SIZE

NUM_LAYERS = 4
SMALL = {"num_hidden_layers": NUM_LAYERS, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` reads in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](**SMALL)).float()


def make_rows(num_rows: int = 16, seq_len: int = 10) -> list[dict[str, torch.Tensor]]:
    """Rows with different numbers of labels."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(num_rows):
        token_ids = torch.randint(2, VOCAB_SIZE, (seq_len,), generator=generator)
        labels = token_ids.clone()
        labels[: i % 7] = -100
        rows.append({"input_ids": token_ids, "labels": labels})
    return rows


def make_args(path: Path, **arguments: Any) -> transformers.TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(path),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**defaults | arguments)


def make_trainer(
    path: Path,
    settings: LayerSkipSettings | ExitAdapterSettings | None,
    model: Any = None,
    **arguments: Any,
) -> transformers.Trainer:
    """With LayerSkip or an exit adapter, or the plain one when `settings` is None."""
    given = {
        "model": model or make_model(),
        "args": make_args(path, **arguments),
        "train_dataset": make_rows(),
        "eval_dataset": make_rows(5),
    }
    if settings is None:
        return transformers.Trainer(**given)
    if isinstance(settings, ExitAdapterSettings):
        return ExitAdapterTrainer(**given, settings=settings)
    return LayerSkipTrainer(**given, settings=settings)


def step_logs(trainer: transformers.Trainer) -> list[dict[str, float]]:
    """The steps' losses, without what depends on the clock."""
    return [
        {k: v for k, v in entry.items() if k.startswith("loss") or k in ("step", "grad_norm")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def weights_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


class Steps(transformers.TrainerCallback):
    """The steps that a trainer has really done."""

    def __init__(self):
        self.begun = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun.append(state.global_step)


def write_corpus(path: Path, columns: tuple[str, ...] = ("text",), num_rows: int = 40) -> Path:
    rows = [{name: f"{name} {i}: {i * i} words" for name in columns} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_config(tmp_path: Path, checkpoint: Any, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config of a run of seconds; `sections` change its values."""
    config: dict[str, Any] = {
        "model": {"path": str(checkpoint(num_hidden_layers=4))},
        "data": {
            "train": [{"path": str(write_corpus(tmp_path / "corpus.jsonl"))}],
            "seq_len": 16,
        },
        "layerskip": {"max_drop_prob": 0.4, "e_scale": 1.0, "rotation": 3, "exit_layer": 2},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 4,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        },
    }
    for name, values in sections.items():
        config[name] = {**config[name], **values} if isinstance(values, dict) else values
    return config


def run(config: dict[str, Any]) -> list[dict[str, float]]:
    """Trains and returns each step's losses."""
    run_config = parse(RunConfig, config)
    trainer = prepare(run_config)
    train(trainer, run_config)
    return read_losses(Path(config["training"]["output_dir"]))


def read_losses(output_dir: Path) -> list[dict[str, float]]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [
        {k: v for k, v in entry.items() if k.startswith("loss") or k in ("step", "grad_norm")}
        for entry in history
        if "loss" in entry
    ]


def assert_accumulation_changes_nothing(make: Any, path: Path, settings: Any) -> None:
    """Rows have different numbers of labels, so a mean of micro-batches' means would differ."""
    logs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make(
            path,
            settings,
            max_steps=3,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        logs.append(step_logs(trainer))
    for whole, accumulated in zip(*logs, strict=True):
        assert accumulated == pytest.approx(whole, rel=1e-4)
