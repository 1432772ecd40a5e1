"""Layer dropout: in training, a decoder layer is skipped for some samples of the batch.

Deeper layers are skipped more often, so the model learns to rely less on them. `LayerSkip` replaces
the `forward` of a transformers model's own layers; in eval mode they are what they were.

Source: LayerSkip, arXiv 2404.16710, section 4.1.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import nn

from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.training.decoder import replace_forward

DepthSchedule = Literal["exponential", "linear", "constant"]
TimeSchedule = Literal["constant", "exponential", "decreasing"]


class LayerDropoutSettings(Settings):
    """How often each layer is skipped."""

    max_drop_prob: float = Field(default=0.1, ge=0, lt=1)
    """p_max, the last layer's probability of being skipped for a sample, where the time schedule is
    at its height."""
    depth_schedule: DepthSchedule = "exponential"
    """D(l), how the probability grows with depth."""
    time_schedule: TimeSchedule = "constant"
    """S(t), how it changes over training: "constant" for continued training and "exponential" from
    scratch, in the paper."""
    rescale: bool = False
    """Whether a kept layer's contribution is divided by its probability of being kept, so that its
    expectation is the same as in eval. The paper does not."""
    seed: int = 0
    """Seed of layer dropout's draws, the same on all ranks: they skip alike."""


def depth_factor(schedule: DepthSchedule, layer_idx: int, num_layers: int) -> float:
    """Return D(l), the share of `max_prob` that layer `layer_idx` gets.

    Exponential is 2^(l / (L - 1)) - 1: 0 for the first layer, 1 for the last.

    Differs: "linear", l / (L - 1), is not in the paper.
    """
    if schedule == "constant":
        return 1.0
    depth = layer_idx / max(num_layers - 1, 1)
    return depth if schedule == "linear" else math.exp(depth * math.log(2.0)) - 1.0


def time_factor(schedule: TimeSchedule, step: int, num_steps: int) -> float:
    """Return S(t), the share of `max_prob` in force at training step `step` of `num_steps`.

    Exponential is 2^(t / (T - 1)) - 1: 0 at the first step, 1 at the last.

    Differs: "decreasing", 1 - t / (T - 1), is not in the paper.
    """
    if schedule == "constant":
        return 1.0
    progress = min(step / max(num_steps - 1, 1), 1.0)
    return 1.0 - progress if schedule == "decreasing" else math.exp(progress * math.log(2.0)) - 1.0


class LayerDropout:
    """Skips decoder layers per sample inside its `with`, by replacing each layer's `forward`.

    What is skipped depends on the seed, the step, the micro-batch and the layer, and on nothing
    else: ranks agree, and activation checkpointing's second forward skips what the first one did.

    A layer takes its hidden states `[batch_size, seq_len, hidden_size]` as first argument and
    returns new ones alone, as decoder layers in transformers 5 do. Any other tensor argument with
    at least two dimensions whose first is `batch_size` (masks, position ids, rotary tables) is per
    sample and is sliced with them.
    """

    def __init__(self, layers: Iterable[nn.Module], settings: LayerDropoutSettings) -> None:
        self._settings = settings
        self._layers = list(layers)
        self._undo: list[Callable[[], None]] = []
        self.set_step(0, 1)

    def __enter__(self) -> Self:
        if self._undo:
            raise RuntimeError("LayerDropout is on already.")
        self._undo = [
            replace_forward(layer, self._wrap(layer, layer_idx, layer.forward))
            for layer_idx, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def set_step(self, step: int, num_steps: int, micro_batch: int = 0) -> None:
        """Say which step's draws the coming forward passes use; see `LayerSkip.set_step`."""
        self._step, self._num_steps, self._micro_batch = step, num_steps, micro_batch

    def drop_prob(self, layer_idx: int) -> float:
        """Return the probability that layer `layer_idx` is skipped for a sample at this step."""
        depth = depth_factor(self._settings.depth_schedule, layer_idx, len(self._layers))
        time = time_factor(self._settings.time_schedule, self._step, self._num_steps)
        return self._settings.max_drop_prob * depth * time

    def kept_samples(self, layer_idx: int, batch_size: int) -> torch.Tensor:
        """Return the indices of the samples that layer `layer_idx` runs, `[num_kept] int64`."""
        generator = torch.Generator()
        generator.manual_seed(self._draw_seed(layer_idx))
        draws = torch.rand(batch_size, generator=generator)
        return (draws >= self.drop_prob(layer_idx)).nonzero().flatten()

    def _draw_seed(self, layer_idx: int) -> int:
        key = f"{self._settings.seed} {self._step} {self._micro_batch} {layer_idx}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")

    def _wrap(
        self, layer: nn.Module, layer_idx: int, forward: Callable[..., torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        def forward_kept(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            drop_prob = self.drop_prob(layer_idx)
            if not layer.training or drop_prob == 0.0:
                return forward(hidden_states, *args, **kwargs)
            batch_size = hidden_states.shape[0]
            kept = self.kept_samples(layer_idx, batch_size).to(hidden_states.device)
            scale = 1.0 / (1.0 - drop_prob) if self._settings.rescale else 1.0
            if len(kept) == 0:
                return hidden_states
            if len(kept) == batch_size and scale == 1.0:
                return forward(hidden_states, *args, **kwargs)
            kept_states = hidden_states.index_select(0, kept)
            output = forward(
                kept_states,
                *_select_samples(args, kept, batch_size),
                **_select_samples(kwargs, kept, batch_size),
            )
            if not isinstance(output, torch.Tensor):
                raise TypeError(
                    f"LayerDropout needs decoder layers that return hidden states alone, "
                    f"{type(layer).__name__} returned {type(output).__name__}."
                )
            if scale != 1.0:
                output = kept_states + (output - kept_states) * scale
            return hidden_states.index_copy(0, kept, output.to(hidden_states.dtype))

        return forward_kept


def _select_samples(value: Any, kept: torch.Tensor, batch_size: int) -> Any:
    """Return `value` with every per-sample tensor in it, nested ones too, cut to the kept samples.

    Raises:
        ValueError: `value` has a KV cache in it, whose other samples' lengths would not match, or
            flex attention's mask, which cannot be cut.
    """
    if type(value).__name__ == "BlockMask":
        raise ValueError("Layer dropout cannot run with flex attention: use sdpa or eager.")
    if isinstance(value, torch.Tensor):
        is_per_sample = value.dim() >= 2 and value.shape[0] == batch_size
        return value.index_select(0, kept) if is_per_sample else value
    if isinstance(value, (tuple, list)):
        return type(value)(_select_samples(item, kept, batch_size) for item in value)
    if isinstance(value, dict):
        if value.get("past_key_values") is not None:
            raise ValueError("Layer dropout cannot run with a KV cache: set use_cache=False.")
        return {key: _select_samples(item, kept, batch_size) for key, item in value.items()}
    return value
