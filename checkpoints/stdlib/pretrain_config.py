"""What decides how `pretrain` makes the checkpoint that the repository carries."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict
from typing_extensions import override

from layerskip_vllm.checkpoint.validation import explain
from layerskip_vllm.training.settings import LayerSkipSettings


class PretrainConfig(BaseModel):
    """Everything that decides what a run makes; the command line sets each field by its name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    recipe: bool = True
    """Whether to train with layer dropout and early exit loss, or plainly."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights, the batches and the layer dropout."""
    num_steps: int = Field(default=2000, ge=1)
    """Optimizer steps."""
    num_growth_steps: int = Field(default=500, ge=0)
    """Steps, the first ones, in which only the first `num_first_layers` layers run. A deep narrow
    model learns slowly at first, and a shallow one costs less a step. Then the others join, as
    copies of the first ones."""
    growth_scale: float = Field(default=0.3, ge=0)
    """What the copies' contributions to the residual stream are scaled by."""
    num_first_layers: int = Field(default=6, ge=1)
    """Layers that run from the start."""
    tokens_per_step: int = Field(default=2048, ge=1)
    """Tokens of a batch."""
    seq_len: int = Field(default=256, ge=1)
    """Tokens of a sequence."""
    long_seq_len: int = Field(default=1024, ge=1)
    """Tokens of a sequence towards the end, and the model's context length."""
    num_long_steps: int = Field(default=40, ge=0)
    """Steps, the last ones, that use `long_seq_len`."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Its peak."""
    num_warmup_steps: int = Field(default=60, ge=0)
    """Steps in which it rises linearly, at the start and when layers join."""
    num_decay_steps: int = Field(default=800, ge=0)
    """Steps, the last ones, in which it falls linearly to 0."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's, for matrices."""
    vocab_size: int = Field(default=2048, ge=1)
    """Tokens of the tokenizer."""
    num_layers: int = Field(default=24, ge=1)
    """L."""
    hidden_size: int = Field(default=128, ge=1)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=384, ge=1)
    """Width of the MLPs."""
    num_heads: int = Field(default=2, ge=1)
    """Query heads, all sharing one key-value head."""
    max_drop_prob: float = Field(default=0.1, ge=0, lt=1)
    """Layer dropout's largest probability."""
    e_scale: float = Field(default=1.0, ge=0, le=1)
    """Weight of an exit's loss, where the last layer's is 1."""
    rotation: int = Field(default=4, ge=1)
    """R, the steps until an exit's loss is on again."""
    min_exit_layer: int = Field(default=3, ge=1)
    """The smallest E that has a loss. From there to `exit_layer` each has one."""
    exit_interval: int = Field(default=3, ge=1)
    """Beyond `exit_layer`, E has a loss if it is a multiple of this."""
    num_distill_steps: int = Field(default=700, ge=0)
    """Steps, the last ones, in which E = `exit_layer` alone has a loss besides the last layer, at
    every step, and learns what the last layer predicts."""
    distill_scale: float = Field(default=2.0, ge=0)
    """Weight of that loss, where the last layer's is 1."""
    exit_layer: int = Field(default=6, ge=1)
    """E that the checkpoint is to be drafted with."""
    num_speculative_tokens: int = Field(default=4, ge=1)
    """K that it is to be drafted with."""

    def make_settings(self) -> LayerSkipSettings:
        """Make LayerSkip's settings; without the recipe they drop nothing, and no exit weighs."""
        exits = range(self.min_exit_layer, self.num_layers)
        return LayerSkipSettings(
            max_drop_prob=self.max_drop_prob if self.recipe else 0.0,
            time_schedule="exponential",
            seed=self.seed,
            e_scale=self.e_scale if self.recipe else 0.0,
            exit_scale="flat",
            rotation=self.rotation,
            exit_layers=tuple(
                e for e in exits if e <= self.exit_layer or e % self.exit_interval == 0
            ),
            recompute_logits=False,
            exit_layer=self.exit_layer,
            num_speculative_tokens=self.num_speculative_tokens,
        )


class _Command(PretrainConfig, BaseSettings):
    """Train a small model with LayerSkip's recipe on the standard library's source."""

    model_config = SettingsConfigDict(cli_kebab_case=True, cli_implicit_flags=True)

    out: Path = Field(description="Folder to write the checkpoint to.")

    @classmethod
    @override
    def settings_customise_sources(cls, *_: Any, **__: Any) -> tuple[()]:
        return ()  # the command line alone, and no environment variable


def parse_args(args: list[str] | None = None) -> tuple[Path, PretrainConfig]:
    """Read the output folder and the run's config from the command line."""
    try:
        command = CliApp.run(_Command, cli_args=args)
    except ValidationError as error:
        raise SystemExit(f"error: {explain(error, _Command)}") from error
    values = command.model_dump()
    return values.pop("out"), PretrainConfig(**values)
