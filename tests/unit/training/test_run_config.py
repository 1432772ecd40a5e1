"""A training run's config: the recipes, what is read from YAML, and what is refused."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml

from layerskip_vllm.checkpoint.validation import parse
from layerskip_vllm.tools.commands import main
from layerskip_vllm.training.run import check_whole_checkpoint, prepare
from layerskip_vllm.training.run_config import RunConfig, list_recipes, load_config, read_tree
from tests.support.training import small_config

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


def test_steps_have_the_rows_asked_for_when_devices_take_fewer(tmp_path, checkpoint):
    config = small_config(tmp_path, checkpoint) | {"sequences_per_step": 12}

    assert parse(RunConfig, config).make_arguments().gradient_accumulation_steps == 3


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
    config = parse(RunConfig, small_config(tmp_path, checkpoint, model=model))

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


def test_numbers_are_floats_when_they_have_an_exponent():
    tree = read_tree("{a: 3e-5, b: 1E3, c: -2.5e+1, d: 1.e2}", [])

    assert tree == {"a": 3e-5, "b": 1000.0, "c": -25.0, "d": 100.0}
    assert all(isinstance(value, float) for value in tree.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "The config is .*; it must be a mapping of sections"),
        ("3", "it must be a mapping"),
        ("{count: 1, count: 2}", "found duplicate key count"),
        ("{count: [1}", "The config is not YAML"),
    ],
)
def test_text_is_refused_when_it_is_no_mapping(text, message):
    with pytest.raises(ValueError, match=message):
        read_tree(text, [])


def test_text_stays_as_it_is_written():
    text = "{a: '${b}', b: '{utterance}', c: '???', d: 2026-01-01, e: null}"

    assert read_tree(text, []) == {
        "a": "${b}",
        "b": "{utterance}",
        "c": "???",
        "d": "2026-01-01",
        "e": None,
    }


SECTIONS = "{a: {b: 1}, items: [{name: x}]}"


def test_assignments_set_values_of_sections_and_list_items():
    assignments = ["a.b=2e-3", "a.c=[1, two]", "items.0.name=y", "new.key=true", "text=a=b"]

    assert read_tree(SECTIONS, assignments) == {
        "a": {"b": 2e-3, "c": [1, "two"]},
        "items": [{"name": "y"}],
        "new": {"key": True},
        "text": "a=b",
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("a.b", "'a.b' sets nothing; write KEY=VALUE"),
        ("items.1.name=y", "items has 1 items and no '1'"),
        ("items.name=y", "items has 1 items and no 'name'"),
        ("a.b.c=1", "a.b is 1, without parts"),
        ("a.b.c.d=1", "a.b is 1, without parts"),
        ("a.b=*.py", r"'a.b=\*.py' sets what is no YAML; put the value in quotes of its own"),
        ("a.b=[1", "sets what is no YAML"),
    ],
)
def test_assignment_names_the_part_when_there_is_none(assignment, message):
    with pytest.raises(ValueError, match=message):
        read_tree(SECTIONS, [assignment])
