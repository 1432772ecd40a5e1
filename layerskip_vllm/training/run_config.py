"""A training run's config: the YAML file's sections as models, and the ready recipes.

`layerskip-vllm train` reads one and gives it to `run`.
"""

import dataclasses
import functools
import io
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, cast, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from transformers import TrainingArguments

from layerskip_vllm.checkpoint.validation import Settings, parse
from layerskip_vllm.training.data import DataConfig
from layerskip_vllm.training.exit_adapter import ExitAdapterSettings
from layerskip_vllm.training.settings import LayerSkipSettings


class ModelConfig(Settings):
    """The model that a run starts from."""

    path: str | None = None
    """A checkpoint's folder or its name on the hub, to go on from."""
    config: dict[str, Any] | None = None
    """Instead, the fields of a transformers config, `model_type` among them, for random weights."""
    tokenizer: str | None = None
    """The tokenizer's folder or name; the checkpoint's own when not given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The weights' dtype. The optimizer works on these; `training.bf16` computes in bfloat16
    whatever it is."""
    attn_implementation: str | None = None
    """transformers' name of an attention kernel; its choice when not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError(
                f"path is {self.path!r} and config is {self.config!r}; one of them must be given."
            )
        if self.config is not None:
            for name, value in (
                ("config.model_type", self.config.get("model_type")),
                ("tokenizer", self.tokenizer),
            ):
                if value is None:
                    raise ValueError(f"{name} is missing; random weights need one.")
        return self


class RunConfig(Settings):
    """One training run."""

    model: ModelConfig
    """What it starts from."""
    data: DataConfig
    """What it trains on."""
    training: dict[str, Any]
    """`transformers.TrainingArguments` by name, with `output_dir`."""
    layerskip: LayerSkipSettings | None = None
    """How it trains for early exit; the defaults when not given."""
    exit_adapter: ExitAdapterSettings | None = None
    """How it trains an exit adapter, with the model frozen, instead."""
    sequences_per_step: int | None = Field(default=None, ge=1)
    """Sequences of an optimizer step over all devices. It sets
    `training.gradient_accumulation_steps` for as many devices as there are."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._checked_training()
        if self.layerskip is not None and self.exit_adapter is not None:
            raise ValueError(
                "layerskip and exit_adapter are both given; with exit_adapter the model is frozen "
                "and has no layer dropout and no other exits. Leave one out."
            )
        if self.exit_adapter is not None and self.model.path is None:
            raise ValueError(
                "model.path is None, and exit_adapter is given; an adapter is trained for a model "
                "that stays as it is, so give its path and not its config."
            )
        if self.training.get("output_dir") is None:
            raise ValueError("training has no 'output_dir', which it must have.")
        if "resume_from_checkpoint" in self.training:
            raise ValueError(
                f"training.resume_from_checkpoint is {self.training['resume_from_checkpoint']!r}; "
                "leave it out: a run goes on from its last checkpoint in output_dir by itself."
            )
        if self.sequences_per_step and "gradient_accumulation_steps" in self.training:
            raise ValueError(
                "training.gradient_accumulation_steps and sequences_per_step are both given; leave "
                "one out."
            )
        if self.data.streaming and self.training.get("max_steps", -1) < 1:
            raise ValueError(
                f"training.max_steps is {self.training.get('max_steps')!r}; data.streaming needs "
                "an integer of at least 1, as a stream's length is not known."
            )
        return self

    @property
    def settings(self) -> LayerSkipSettings | ExitAdapterSettings:
        """How it trains: by `exit_adapter` or `layerskip`, whichever is given."""
        return self.exit_adapter or self.layerskip or LayerSkipSettings()

    def _checked_training(self) -> dict[str, Any]:
        section = parse(_make_training_model(), self.training, "training")
        return section.model_dump(exclude_unset=True)

    def make_arguments(self) -> TrainingArguments:
        """Make the Trainer's arguments, with gradients accumulated up to `sequences_per_step`.

        `ValueError` if that is no multiple of what this machine's devices take at once.
        """
        args = TrainingArguments(**self._checked_training())
        if self.sequences_per_step is not None:
            at_once = args.per_device_train_batch_size * args.world_size
            if self.sequences_per_step % at_once:
                raise ValueError(
                    f"sequences_per_step is {self.sequences_per_step}; it must be a multiple of "
                    f"{at_once}, which is training.per_device_train_batch_size "
                    f"{args.per_device_train_batch_size} on {args.world_size} devices."
                )
            args.gradient_accumulation_steps = self.sequences_per_step // at_once
        return args


class _TrainingSection(Settings):
    model_config = ConfigDict(arbitrary_types_allowed=True)


@functools.cache
def _make_training_model() -> type[BaseModel]:
    """Make a model of `TrainingArguments`' fields, which checks them without making one."""
    hints = get_type_hints(TrainingArguments)
    hints["fsdp"] |= bool  # transformers takes true and false, whatever its annotation says
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    fields: dict[str, Any] = {name: (hints[name], None) for name in names}
    return create_model("TrainingSection", __base__=_TrainingSection, **fields)


def list_recipes() -> dict[str, str]:
    """Return the ready recipes' names, each with what its first line says."""
    files = resources.files("layerskip_vllm.training").joinpath("recipes").iterdir()
    texts = {file.name: file.read_text() for file in files if file.name.endswith(".yaml")}
    return {
        name.removesuffix(".yaml"): text.partition("\n")[0].removeprefix("# ")
        for name, text in sorted(texts.items())
    }


def read_config_text(name: str) -> str:
    """Read a YAML file or a ready recipe; `ValueError` if there is neither of that name."""
    if Path(name).is_file():
        return Path(name).read_text()
    if name in list_recipes():
        recipes = resources.files("layerskip_vllm.training").joinpath("recipes")
        return recipes.joinpath(f"{name}.yaml").read_text()
    raise ValueError(
        f"{name!r} is neither a file nor a recipe; recipes are {', '.join(list_recipes())}."
    )


def load_config(name: str, assignments: list[str] | None = None) -> RunConfig:
    """Read and check a run's config: a YAML file or a ready recipe, with values set over its own.

    `ValueError` if something in it is unknown, missing or wrong.
    """
    return parse(RunConfig, read_tree(read_config_text(name), assignments or []))


def read_tree(text: str, assignments: list[str]) -> dict[str, Any]:
    """Read a YAML text whose top is a mapping, and set values over its own.

    An assignment is such as `training.max_steps=100`, or `data.train.0.path=...` for a list's item;
    its value is YAML. `ValueError` if the text is no YAML, not a mapping or has a key twice, or an
    assignment is none or its path goes through something that has no such part.
    """
    try:
        config: Any = OmegaConf.load(io.StringIO(text))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"The config is not YAML: {error}") from error
    except OSError:  # a number alone
        config = None
    if not isinstance(config, DictConfig):
        raise ValueError(f"The config is {text[:40]!r}; it must be a mapping of sections.")
    for assignment in assignments:
        _assign(config, assignment)
    return cast(dict[str, Any], OmegaConf.to_container(config))


def _assign(config: DictConfig, assignment: str) -> None:
    path, equals, _ = assignment.partition("=")
    if not equals or not path:
        raise ValueError(f"{assignment!r} sets nothing; write KEY=VALUE, as in training.seed=1.")
    _check_path(config, path, assignment)
    try:
        config.merge_with_dotlist([assignment])
    except yaml.YAMLError as error:
        raise ValueError(
            f"{assignment!r} sets what is no YAML; put the value in quotes of its own, as in "
            f"{path}='\"...\"'. {error}"
        ) from error


def _check_path(config: DictConfig, path: str, assignment: str) -> None:
    """Refuse a path through a value, which would be replaced, or through an item that is not."""
    node: Any = config
    parts = path.split(".")
    for i, part in enumerate(parts):
        where = ".".join(parts[:i])
        if isinstance(node, ListConfig):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(
                    f"{assignment!r} cannot be set: {where} has {len(node)} items and no {part!r}."
                )
            node = node[int(part)]
        elif isinstance(node, DictConfig):
            node = node.get(part)
        elif node is not None:
            raise ValueError(f"{assignment!r} cannot be set: {where} is {node!r}, without parts.")
