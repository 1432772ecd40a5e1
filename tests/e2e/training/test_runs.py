"""Whole runs of `layerskip-vllm train`: the recipes in miniature, a kill, and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from layerskip_vllm.checkpoint.entry import default_settings
from layerskip_vllm.checkpoint.exit_adapter import load_exit_adapter
from layerskip_vllm.checkpoint.validation import parse
from layerskip_vllm.tools.commands import main
from layerskip_vllm.training.run import find_last_checkpoint, prepare
from layerskip_vllm.training.run_config import RunConfig, load_config
from layerskip_vllm.training.trainer import LayerSkipTrainer
from tests.support.training import (
    read_losses,
    run,
    small_config,
    weights_equal,
    write_corpus,
)

ROOT = Path(__file__).parents[3]
NUM_LAYERS = {
    "continual-llama2-7b": 32,
    "continual-llama2-13b": 40,
    "continual-llama3-8b": 32,
    "continual-llama3.2-1b": 16,
    "scratch-llama-1.5b": 24,
    "scratch-llama2-7b": 32,
    "code-llama1-7b": 32,
    "topv2-llama-1.5b": 24,
}


@pytest.fixture
def micro_batches(monkeypatch):
    """The step of each micro-batch that this process has really trained on."""
    steps, training_step = [], LayerSkipTrainer.training_step

    def record(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(LayerSkipTrainer, "training_step", record)
    return steps


@pytest.mark.parametrize("name", NUM_LAYERS)
def test_recipe_makes_a_checkpoint_when_run_in_miniature(tmp_path, checkpoint, name):
    """A model as deep as the recipe's, on files of its data sets' shapes."""
    num_layers = NUM_LAYERS[name]
    model = checkpoint(num_hidden_layers=num_layers, hidden_size=16, intermediate_size=16)
    columns = ("domain", "utterance", "semantic_parse", "text", "content")
    corpus = write_corpus(tmp_path / "corpus.jsonl", columns)
    recipe = load_config(name)
    assignments = [
        f"training.output_dir={tmp_path / 'out'}",
        "training.max_steps=2",
        "training.per_device_train_batch_size=2",
        "training.use_cpu=true",
        "training.fsdp=false",
        "training.disable_tqdm=true",
        "training.dataloader_pin_memory=false",
        "training.logging_steps=1",
        "sequences_per_step=4",
        "data.seq_len=64",
        *(f"data.train.{i}.path={corpus}" for i in range(len(recipe.data.train))),
        *(f"data.evaluation.{i}.path={corpus}" for i in range(len(recipe.data.evaluation))),
    ]
    if recipe.model.path is None:
        small = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2}
        assignments += [f"model.config.{key}={value}" for key, value in small.items()]
        assignments.append(f"model.tokenizer={model}")
    else:
        assignments.append(f"model.path={model}")

    assert main(["train", name, *assignments]) == 0

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"
    assert len(loaded.model.layers) == num_layers
    settings = default_settings(str(tmp_path / "out"), config, num_layers)
    assert settings.exit_layer.value == recipe.layerskip.exit_layer
    assert settings.num_speculative_tokens.value == recipe.layerskip.num_speculative_tokens
    assert settings.exit_layer.source == "the checkpoint's config.json"
    losses = read_losses(tmp_path / "out")
    assert [entry["step"] for entry in losses] == [1, 2]
    assert all(f"loss_exit_{num_layers}" in entry for entry in losses)


def test_killed_run_goes_on_as_if_it_had_not_been(tmp_path, checkpoint, micro_batches):
    """The process gets SIGKILL after its first checkpoint; the same command then goes on."""
    training = {"max_steps": 60, "save_steps": 5, "save_total_limit": 2}
    config = small_config(tmp_path, checkpoint, training=training)
    whole = {**config, "training": {**config["training"], "output_dir": str(tmp_path / "whole")}}
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config))
    code = (
        "import sys; from layerskip_vllm.tools.commands import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "train", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "c")}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while find_last_checkpoint(out) is None and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stopped_after = int(find_last_checkpoint(out).name.rpartition("-")[2])
    assert 0 < stopped_after < 60
    assert not (out / "model.safetensors").exists()

    assert main(["train", str(path)]) == 0
    assert micro_batches == list(range(stopped_after, 60))
    expected = run(whole)

    assert len(expected) == 60
    assert read_losses(out) == expected
    weights = [
        transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (out, tmp_path / "whole")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_stream_goes_on_where_it_was_when_stopped(tmp_path, checkpoint, micro_batches):
    """A checkpoint of 4 of 10 steps, and one after it that was not written to its end."""
    write_corpus(tmp_path / "other.txt")
    sources = [
        {"path": str(tmp_path / "corpus.jsonl"), "weight": 1.0},
        {"path": str(tmp_path / "other.txt"), "weight": 1.0},
    ]
    sections = {
        "data": {"train": sources, "streaming": True},
        "training": {"max_steps": 10, "gradient_accumulation_steps": 2},
    }
    config = small_config(tmp_path, checkpoint, **sections)
    expected = run(config)
    whole = tmp_path / "out"
    assert find_last_checkpoint(whole).name == "checkpoint-10"
    for name in ("checkpoint-8", "checkpoint-10"):
        (whole / name / "trainer_state.json").unlink()
    (whole / "trainer_state.json").unlink()
    assert find_last_checkpoint(whole).name == "checkpoint-4"

    micro_batches.clear()

    assert run(config) == expected
    assert len(expected) == 10
    assert micro_batches == [step for step in range(4, 10) for _ in range(2)]


def test_finished_run_trains_no_more_when_run_again(tmp_path, checkpoint, micro_batches):
    config = small_config(tmp_path, checkpoint)
    expected = run(config)
    micro_batches.clear()

    assert run(config) == expected
    assert micro_batches == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("layerskip", "e_scale", 0.5), ("data", "seq_len", 8), ("model", "dtype", "bfloat16")],
)
def test_run_of_another_config_is_refused_when_it_is_in_the_folder(
    tmp_path, checkpoint, section, key, value
):
    run(small_config(tmp_path, checkpoint))
    other = small_config(tmp_path, checkpoint, **{section: {key: value}})

    with pytest.raises(ValueError, match=rf"whose run has {section}\.{key} .*not {value!r}"):
        prepare(parse(RunConfig, other))


def test_command_trains_an_adapter_and_says_how_to_serve_it(tmp_path, checkpoint, capsys):
    """Run again, it goes on from its last checkpoint; with another rank it is refused."""
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    config = small_config(tmp_path, checkpoint) | {"exit_adapter": {"rank": 8, "exit_layer": 2}}
    del config["layerskip"]
    path.write_text(yaml.safe_dump(config))

    assert main(["train", str(path)]) == 0
    said = capsys.readouterr().out
    speculative = json.dumps({"method": "layerskip", "exit_adapter": str(out)})
    assert f"vllm serve {config['model']['path']} --speculative-config '{speculative}'" in said
    assert not (out / "config.json").exists()
    first = load_exit_adapter(out)
    assert (first.config.exit_layer, first.config.num_speculative_tokens) == (2, 4)

    assert main(["train", str(path), "training.max_steps=8"]) == 0
    assert not weights_equal(load_exit_adapter(out), first)
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [*range(1, 9)]

    assert main(["train", str(path), "exit_adapter.rank=9"]) == 2
    assert "whose run has exit_adapter.rank 8, not 9" in capsys.readouterr().err
