"""Whole runs of `layerskip-vllm train`: the recipes in miniature, a kill, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml

from layerskip_vllm.checkpoint.entry import default_settings
from layerskip_vllm.tools.commands import main
from layerskip_vllm.training.run import (
    check_whole_checkpoint,
    find_last_checkpoint,
    prepare,
    train,
)
from layerskip_vllm.training.run_config import RunConfig, list_recipes, load_config
from layerskip_vllm.training.strict_yaml import make_dataclass
from layerskip_vllm.training.trainer import LayerSkipTrainer

ROOT = Path(__file__).parents[3]
# Layers, p_max, S(t), e_scale, curriculum, R, tokens a step, steps, learning rate: the paper's
# section 5 and tables 8 to 10; None where it says nothing.
PAPER: dict[str, tuple[Any, ...]] = {
    "continual-llama2-7b": (32, 0.1, "constant", 0.2, "rotational", 8, 2**20, 50_000, 3e-5),
    "continual-llama2-13b": (40, 0.1, "constant", 0.1, "rotational", 39, 2**20, 50_000, 2e-5),
    "continual-llama3-8b": (32, 0.1, "constant", 0.1, "rotational", 8, None, None, None),
    "continual-llama3.2-1b": (16, 0.1, "constant", 0.1, "rotational", 8, None, None, None),
    "scratch-llama-1.5b": (24, 0.1, "exponential", 0.2, "rotational", 23, 2**19, 50_000, 8e-4),
    "scratch-llama2-7b": (32, 0.2, "exponential", 0.2, "rotational", 31, 2**19, 50_000, 8e-4),
    "code-llama1-7b": (32, 0.1, "constant", 1.0, "rotational", 16, 2**19, 10_000, 1e-4),
    "topv2-llama-1.5b": (24, 0.2, "constant", 1.0, "gradual", None, None, 5_800, 1e-4),
}
PARAMETERS = {"scratch-llama-1.5b": 1.5e9, "scratch-llama2-7b": 6.74e9}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def micro_batches(monkeypatch):
    """The step of each micro-batch that this process has really trained on."""
    steps, training_step = [], LayerSkipTrainer.training_step

    def record(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(LayerSkipTrainer, "training_step", record)
    return steps


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
    run_config = make_dataclass(RunConfig, config, "")
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


@pytest.mark.parametrize("name", PAPER)
def test_recipe_has_the_papers_settings(name):
    config = load_config(name)
    settings, training = config.layerskip, config.training
    num_layers, max_drop_prob, time_schedule, e_scale, curriculum, rotation, *sizes = PAPER[name]

    assert settings.max_drop_prob == max_drop_prob
    assert settings.depth_schedule == "exponential"
    assert settings.time_schedule == time_schedule
    assert settings.e_scale == e_scale
    assert settings.exit_scale == "sum"
    assert settings.curriculum == curriculum
    assert not settings.rescale
    assert settings.target == "labels"
    assert settings.exit_layers is None
    if rotation is not None:
        assert settings.rotation == rotation
    settings.check_fits(num_layers)
    found = (
        config.data.seq_len * config.sequences_per_step,
        training["max_steps"],
        training["learning_rate"],
    )
    assert [x for x, size in zip(found, sizes, strict=True) if size is not None] == [
        size for size in sizes if size is not None
    ]


def test_every_recipe_is_tested_and_has_a_title():
    recipes = list_recipes()

    assert set(recipes) == set(PAPER)
    assert all(len(title) > 20 and "\n" not in title for title in recipes.values())


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe_from_scratch_has_its_number_of_parameters(name):
    config = load_config(name).model.config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )

    assert model.config.num_hidden_layers == PAPER[name][0]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.02)


@pytest.mark.parametrize("name", PAPER)
def test_recipe_makes_a_checkpoint_when_run_in_miniature(tmp_path, checkpoint, name):
    """A model as deep as the recipe's, on files of its data sets' shapes."""
    num_layers = PAPER[name][0]
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


class SpreadWeights:
    """What transformers says of a DeepSpeed config of stage 3."""

    def __init__(self, is_gathered: bool) -> None:
        self.is_gathered = is_gathered

    def is_zero3(self) -> bool:
        return True

    def is_true(self, key: str) -> bool:
        return self.is_gathered and key.endswith("stage3_gather_16bit_weights_on_model_save")


def test_deepspeed_is_refused_when_it_would_not_save_whole_weights():
    check_whole_checkpoint(SimpleNamespace(hf_deepspeed_config=None))
    check_whole_checkpoint(SimpleNamespace(hf_deepspeed_config=SpreadWeights(is_gathered=True)))
    with pytest.raises(ValueError, match=r"training\.deepspeed .* is not true; set it to true"):
        check_whole_checkpoint(SimpleNamespace(hf_deepspeed_config=SpreadWeights(False)))


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
        prepare(make_dataclass(RunConfig, other, ""))


def test_steps_have_the_rows_asked_for_when_devices_take_fewer(tmp_path, checkpoint):
    config = small_config(tmp_path, checkpoint) | {"sequences_per_step": 12}

    assert make_dataclass(RunConfig, config, "").make_arguments().gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sequences_per_step": 6}, "sequences_per_step is 6; it must be a multiple of 4"),
        ({"sequences_per_step": 0}, "sequences_per_step is 0; it must be an integer of at least 1"),
        (
            {"sequences_per_step": 4, "training": {"gradient_accumulation_steps": 1}},
            "both given; leave one out",
        ),
        ({"training": {"max_stepz": 1}}, "training has the unknown key 'max_stepz'; like it are"),
        ({"training": {"learning_rate": "x"}}, "training.learning_rate is 'x'; it must be a num"),
        ({"training": {"output_dir": None}}, "training has no 'output_dir'"),
        ({"training": {"resume_from_checkpoint": "x"}}, "resume_from_checkpoint is 'x'; leave it"),
        (
            {"training": {"max_steps": -1}, "data": {"streaming": True}},
            "training.max_steps is -1; data.streaming needs",
        ),
        ({"model": {"path": None}}, "model: path is None and config is None; one of them"),
        ({"model": {"config": {}}}, "one of them must be given"),
        ({"model": {"path": None, "config": {"a": 1}}}, "model: config.model_type is missing"),
        (
            {"model": {"path": None, "config": {"model_type": "llama"}}},
            "model: tokenizer is missing",
        ),
        ({"layerskip": {"rotation": 9}}, "rotation is 9; it must be from 1 to 4"),
        ({"layerskip": {"exit_layer": 4}}, "exit_layer is 4; it must be from 1 to 3"),
        (
            {
                "training": {
                    "gradient_checkpointing": True,
                    "gradient_checkpointing_kwargs": {"use_reentrant": True},
                }
            },
            "gradient_checkpointing_kwargs has use_reentrant true",
        ),
        ({"layerskip": {"p_max": 4}}, "layerskip has the unknown key 'p_max'; known are max_drop"),
        ({"optimizer": {}}, "The config has the unknown key 'optimizer'; known are model, data"),
    ],
)
def test_command_names_what_is_wrong_when_the_config_is(
    tmp_path, checkpoint, capsys, sections, message
):
    base = small_config(tmp_path, checkpoint)
    known = {name: values for name, values in sections.items() if name in base}
    config = small_config(tmp_path, checkpoint, **known)
    config |= {name: values for name, values in sections.items() if name not in base}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    assert main(["train", str(tmp_path / "config.yaml")]) == 2

    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_model_is_refused_when_it_has_fewer_tokens_than_the_tokenizer(tmp_path, checkpoint):
    model = {
        "path": None,
        "config": {"model_type": "llama", "vocab_size": 8, "num_hidden_layers": 4}
        | {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
        "tokenizer": str(checkpoint(num_hidden_layers=4)),
    }
    config = make_dataclass(RunConfig, small_config(tmp_path, checkpoint, model=model), "")

    with pytest.raises(ValueError, match="tokenizer has 256 tokens and the model 8"):
        prepare(config)


def test_command_lists_the_recipes_when_no_config_is_given(capsys):
    assert main(["train"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(PAPER)


def test_command_prints_a_recipe_that_can_be_read_again_when_asked_to(tmp_path, capsys):
    assert main(["train", "topv2-llama-1.5b", "--print"]) == 0

    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_config(str(tmp_path / "mine.yaml")) == load_config("topv2-llama-1.5b")


def test_command_refuses_to_print_what_is_not_written_when_given_assignments(capsys):
    assert main(["train", "topv2-llama-1.5b", "training.seed=1", "--print"]) == 2

    assert "leave out training.seed=1" in capsys.readouterr().err


def test_command_names_the_recipes_when_the_config_is_neither_file_nor_recipe(capsys):
    assert main(["train", "nothing"]) == 2

    assert "'nothing' is neither a file nor a recipe; recipes are code-" in capsys.readouterr().err


def test_command_says_what_to_install_when_a_package_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "layerskip_vllm.training.data", None)
    for name in ("run", "run_config"):
        monkeypatch.delitem(sys.modules, f"layerskip_vllm.training.{name}")
        monkeypatch.delattr(f"layerskip_vllm.training.{name}", raising=False)

    assert main(["train", "topv2-llama-1.5b"]) == 2
    assert "pip install 'layerskip-vllm[train]'" in capsys.readouterr().err
