"""What decides how `pretrain` makes the checkpoint that the repository carries."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what a run makes; the command line sets each field by its name.

    Attributes:
        recipe: Whether to train with layer dropout and early exit loss, or plainly.
        seed: Seed of the weights, the batches and the layer dropout.
        num_steps: Optimizer steps.
        num_growth_steps: Steps, the first ones, in which only the first `num_first_layers` layers
            run. A deep narrow model learns slowly at first, and a shallow one costs less a step.
            Then the others join, as copies of the first ones.
        growth_scale: What the copies' contributions to the residual stream are scaled by.
        num_first_layers: Layers that run from the start.
        tokens_per_step: Tokens of a batch.
        seq_len: Tokens of a sequence.
        long_seq_len: Tokens of a sequence towards the end, and the model's context length.
        num_long_steps: Steps, the last ones, that use `long_seq_len`.
        learning_rate: Its peak.
        num_warmup_steps: Steps in which it rises linearly, at the start and when layers join.
        num_decay_steps: Steps, the last ones, in which it falls linearly to 0.
        weight_decay: AdamW's, for matrices.
        vocab_size: Tokens of the tokenizer.
        num_layers: L.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLPs.
        num_heads: Query heads, all sharing one key-value head.
        max_drop_prob: Layer dropout's largest probability.
        e_scale: Weight of an exit's loss, where the last layer's is 1.
        rotation: R, the steps until an exit's loss is on again.
        min_exit_layer: The smallest E that has a loss. From there to `exit_layer` each has one.
        exit_interval: Beyond `exit_layer`, E has a loss if it is a multiple of this.
        num_distill_steps: Steps, the last ones, in which E = `exit_layer` alone has a loss besides
            the last layer, at every step, and learns what the last layer predicts.
        distill_scale: Weight of that loss, where the last layer's is 1.
        exit_layer: E that the checkpoint is to be drafted with.
        num_speculative_tokens: K that it is to be drafted with.
    """

    recipe: bool = True
    seed: int = 0
    num_steps: int = 2000
    num_growth_steps: int = 500
    growth_scale: float = 0.3
    num_first_layers: int = 6
    tokens_per_step: int = 2048
    seq_len: int = 256
    long_seq_len: int = 1024
    num_long_steps: int = 40
    learning_rate: float = 3e-3
    num_warmup_steps: int = 60
    num_decay_steps: int = 800
    weight_decay: float = 0.1
    vocab_size: int = 2048
    num_layers: int = 24
    hidden_size: int = 128
    intermediate_size: int = 384
    num_heads: int = 2
    max_drop_prob: float = 0.1
    e_scale: float = 1.0
    rotation: int = 4
    min_exit_layer: int = 3
    exit_interval: int = 3
    num_distill_steps: int = 700
    distill_scale: float = 2.0
    exit_layer: int = 6
    num_speculative_tokens: int = 4


def parse_args(
    description: str | None, args: list[str] | None = None
) -> tuple[Path, PretrainConfig]:
    """Returns the output folder and the run's config from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    for field in fields(PretrainConfig):
        option = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(
                option, action=argparse.BooleanOptionalAction, default=field.default
            )
        else:
            parser.add_argument(option, type=field.type, default=field.default)
    values = vars(parser.parse_args(args))
    return values.pop("out"), PretrainConfig(**values)
