"""A training run's config: the YAML file's sections as dataclasses, and the ready recipes.

`layerskip-vllm train` reads one and gives it to `run`.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from layerskip_vllm.checkpoint.checks import check_positive_int
from layerskip_vllm.training.data import DataConfig
from layerskip_vllm.training.exit_adapter import ExitAdapterSettings
from layerskip_vllm.training.settings import LayerSkipSettings
from layerskip_vllm.training.strict_yaml import check_fields, make_dataclass, override, read_yaml


@dataclass(frozen=True)
class ModelConfig:
    """The model that a run starts from.

    Attributes:
        path: A checkpoint's folder or its name on the hub, to go on from.
        config: Instead, the fields of a transformers config, `model_type` among them, for random
            weights.
        tokenizer: The tokenizer's folder or name; the checkpoint's own when None.
        dtype: The weights' dtype. The optimizer works on these; `training.bf16` computes in
            bfloat16 whatever it is.
        attn_implementation: transformers' name of an attention kernel; its choice when None.

    Raises:
        ValueError: Not exactly one of `path` and `config` is given, or there is no tokenizer.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        model: What it starts from.
        data: What it trains on.
        training: `transformers.TrainingArguments` by name, with `output_dir`.
        layerskip: How it trains for early exit; the defaults when None.
        exit_adapter: How it trains an exit adapter, with the model frozen, instead.
        sequences_per_step: Sequences of an optimizer step over all devices. It sets
            `gradient_accumulation_steps` for as many devices as there are.

    Raises:
        ValueError: A key of `training` is unknown, missing, of another type or without use here, or
            both `sequences_per_step` and `gradient_accumulation_steps`, or both `layerskip` and
            `exit_adapter`, are given, or an adapter is asked for a model of random weights.
    """

    model: ModelConfig
    data: DataConfig
    training: dict[str, Any]
    layerskip: LayerSkipSettings | None = None
    exit_adapter: ExitAdapterSettings | None = None
    sequences_per_step: int | None = None

    def __post_init__(self) -> None:
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
        if self.sequences_per_step is not None:
            check_positive_int("sequences_per_step", self.sequences_per_step)
            if "gradient_accumulation_steps" in self.training:
                raise ValueError(
                    "training.gradient_accumulation_steps and sequences_per_step are both given; "
                    "leave one out."
                )
        if self.data.streaming and self.training.get("max_steps", -1) < 1:
            raise ValueError(
                f"training.max_steps is {self.training.get('max_steps')!r}; data.streaming needs "
                "an integer of at least 1, as a stream's length is not known."
            )

    @property
    def settings(self) -> LayerSkipSettings | ExitAdapterSettings:
        """How it trains: by `exit_adapter` or `layerskip`, whichever is given."""
        return self.exit_adapter or self.layerskip or LayerSkipSettings()

    def _checked_training(self) -> dict[str, Any]:
        # transformers takes true and false for `fsdp`, whatever its annotation says.
        is_bool = isinstance(self.training.get("fsdp"), bool)
        fsdp = {"fsdp": self.training["fsdp"]} if is_bool else {}
        others = {key: value for key, value in self.training.items() if key not in fsdp}
        return check_fields(TrainingArguments, others, "training") | fsdp

    def make_arguments(self) -> TrainingArguments:
        """Makes the Trainer's arguments, with gradients accumulated up to `sequences_per_step`.

        Returns:
            The arguments for this machine.

        Raises:
            ValueError: `sequences_per_step` is no multiple of what the devices take at once.
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


def list_recipes() -> dict[str, str]:
    """Returns the ready recipes' names, each with what its first line says."""
    files = resources.files("layerskip_vllm.training").joinpath("recipes").iterdir()
    texts = {file.name: file.read_text() for file in files if file.name.endswith(".yaml")}
    return {
        name.removesuffix(".yaml"): text.partition("\n")[0].removeprefix("# ")
        for name, text in sorted(texts.items())
    }


def read_config_text(name: str) -> str:
    """Returns the text of a config.

    Args:
        name: A YAML file's path, or the name of a ready recipe.

    Returns:
        The YAML.

    Raises:
        ValueError: There is neither such a file nor such a recipe.
    """
    if Path(name).is_file():
        return Path(name).read_text()
    if name in list_recipes():
        recipes = resources.files("layerskip_vllm.training").joinpath("recipes")
        return recipes.joinpath(f"{name}.yaml").read_text()
    raise ValueError(
        f"{name!r} is neither a file nor a recipe; recipes are {', '.join(list_recipes())}."
    )


def load_config(name: str, assignments: list[str] | None = None) -> RunConfig:
    """Reads a run's config.

    Args:
        name: A YAML file's path, or the name of a ready recipe.
        assignments: Values to set over the file's, see `override`.

    Returns:
        The config, checked.

    Raises:
        ValueError: Something in it is unknown, missing or wrong.
    """
    tree = read_yaml(read_config_text(name))
    for assignment in assignments or []:
        override(tree, assignment)
    return make_dataclass(RunConfig, tree, "")
