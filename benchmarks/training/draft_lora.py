"""A draft LoRA: low-rank changes of the first E layers that only draft steps see.

A study's code, used by `curve_learners`; the product has none of it. The model that verifies stays
what it is: a draft reads the keys and values that the unchanged layers wrote of all verified
tokens, and those that changed layers wrote of its own round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

LORA_SCALE = 2.0  # of every low-rank product


class KeysValues:
    """What attention layers take for their cache: a pass's keys and values for a later one.

    The first pass through a layer leaves its own here; each later pass has them before its own.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a layer's new keys and values, return all; `[batch_size, heads, length, size]`."""
        if layer_idx not in self._kept:
            self._kept[layer_idx] = keys, values
            return keys, values
        kept_keys, kept_values = self._kept[layer_idx]
        return torch.cat([kept_keys, keys], -2), torch.cat([kept_values, values], -2)


def run_prefix(
    model: Any,
    token_ids: torch.Tensor,
    num_layers: int,
    keys_values: KeysValues | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a Llama-like model's first layers and its final norm on `[batch_size, seq_len] int64`.

    Returns what the head reads, `[batch_size, seq_len, hidden_size]`. Attention is causal where
    there is no mask, `[seq_len, num_keys] bool`.
    """
    decoder = model.model
    states = decoder.embed_tokens(token_ids)
    position_ids = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    position_embeddings = decoder.rotary_emb(states, position_ids=position_ids)
    for layer in decoder.layers[:num_layers]:
        states = layer(
            states,
            attention_mask=None if attention_mask is None else attention_mask[None, None],
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            past_key_values=keys_values,
        )
    normed: torch.Tensor = decoder.norm(states)
    return normed


def make_draft_mask(seq_len: int, offset: int, num_speculative_tokens: int) -> torch.Tensor:
    """Say which keys each place of a text sees as a draft, `[seq_len, 2 * seq_len] bool`.

    The text is cut into rounds of K drafts, of which one begins at place `offset`. The first half
    of the keys are the verified tokens', seen by all later rounds; the second half the drafts'
    own, seen by their round from themselves on.
    """
    places = torch.arange(seq_len)
    rounds = torch.div(places - offset, num_speculative_tokens, rounding_mode="floor")
    is_earlier = rounds[:, None] > rounds
    is_own = (rounds[:, None] == rounds) & (places[:, None] >= places)
    return torch.cat([is_earlier, is_own], dim=1)


class LowRank(nn.Module):
    """A linear map of low rank, zero at first; in float32, whatever it is applied to."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        down = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        low = functional.linear(inputs, self.down.to(inputs.dtype))
        return functional.linear(low, (LORA_SCALE * self.up).to(inputs.dtype))


class DraftLora(nn.Module):
    """Low-rank changes of all linear maps in some layers, and a scale of what the head reads.

    The layers compute what they always do outside of `with lora.on()`.
    """

    def __init__(self, layers: Sequence[nn.Module], hidden_size: int, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale = nn.Parameter(torch.zeros(hidden_size))  # added to 1
        self.changes = nn.ModuleDict()
        self._is_on = False
        for layer_idx, layer in enumerate(layers):
            for name, linear in layer.named_modules():
                if isinstance(linear, nn.Linear):
                    change = LowRank(linear.in_features, linear.out_features, rank, generator)
                    self.changes[f"{layer_idx}.{name}".replace(".", "-")] = change
                    linear.register_forward_hook(partial(self._add, change))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Change the layers for the time of a `with`."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Scale what changed layers and the final norm have made, `[..., hidden_size]`."""
        return states * (1 + self.scale).to(states.dtype)

    def _add(
        self, change: LowRank, _linear: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        return output + change(args[0]) if self._is_on else output
