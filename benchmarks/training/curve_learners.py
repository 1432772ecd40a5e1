"""The three ways to a model whose first layers draft, each with a loss and what it drafts from.

Used by `three_curves`. A Llama-like model of transformers is meant: Llama, Mistral, Qwen.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.training.curve_targets import TargetFile, head_loss
from benchmarks.training.draft_lora import DraftLora, KeysValues, make_draft_mask, run_prefix
from layerskip_vllm.checkpoint.exit_adapter import ExitAdapter, ExitAdapterConfig
from layerskip_vllm.training.layer_skip import LayerSkip
from layerskip_vllm.training.settings import LayerSkipSettings

NUM_SPECULATIVE_TOKENS = 4
ADAPTER_RANK, LORA_RANK = 128, 32


class Learner(Protocol):
    """One way to learn."""

    trained: nn.Module  # all of its parameters, and what is saved
    exit_layers: tuple[int, ...]  # the exits that draft
    changes_model: bool  # whether the model that verifies learns too
    learning_rate: float
    weight_decay: float

    def loss(self, token_ids: torch.Tensor, first_row: int, step: int) -> torch.Tensor:
        """Compute a step's loss, `[] float32`, on `[num_rows, seq_len] int64` of all rows."""

    def draft_states(self, token_ids: torch.Tensor, exit_layer: int) -> list[torch.Tensor]:
        """Compute what the head drafts from, `[batch_size, seq_len, hidden_size]`.

        One for each offset at which rounds of K drafts may begin, or a single one where a draft is
        the same at each place in its round.
        """


class RecipeLearner:
    """The paper's recipe, continual: the whole model learns the text, and its exits with it."""

    changes_model = True
    learning_rate, weight_decay = 1e-4, 0.1

    def __init__(self, model: Any, exit_layers: tuple[int, ...], dtype: torch.dtype) -> None:
        """Take the model in float32; `dtype` is what its products are computed in."""
        self.trained = self._model = model.requires_grad_(True)
        self.exit_layers, self._dtype = exit_layers, dtype
        # Weights as docs/training.md has them for runs that are short.
        self._layer_skip = LayerSkip(model, LayerSkipSettings(e_scale=1.0, rotation=8))

    def loss(self, token_ids: torch.Tensor, first_row: int, step: int) -> torch.Tensor:
        """Compute the early exit loss of a step, with layer dropout."""
        self._model.train()
        self._layer_skip.set_step(step, 1)  # nothing hangs on the number of steps here
        is_mixed = self._dtype != torch.float32
        with self._layer_skip, torch.autocast(token_ids.device.type, self._dtype, is_mixed):
            loss: torch.Tensor = self._model(input_ids=token_ids, labels=token_ids).loss
        self._model.eval()
        return loss

    def draft_states(self, token_ids: torch.Tensor, exit_layer: int) -> list[torch.Tensor]:
        """Return the exit as it is."""
        return [run_prefix(self._model, token_ids, exit_layer)]


class ExitAdapterLearner:
    """The product's exit adapter on a frozen model: a linear map before the head."""

    changes_model = False
    learning_rate, weight_decay = 2e-3, 0.0

    def __init__(self, model: Any, exit_layer: int, targets: TargetFile) -> None:
        self._model, self._targets = model, targets
        self.exit_layers: tuple[int, ...] = (exit_layer,)
        size = model.config.hidden_size
        config = ExitAdapterConfig(
            exit_layer=exit_layer,
            num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
            rank=min(ADAPTER_RANK, size),
            hidden_size=size,
            num_hidden_layers=model.config.num_hidden_layers,
        )
        self.trained: nn.Module = ExitAdapter(config).initialize(0).to(model.device)

    def loss(self, token_ids: torch.Tensor, first_row: int, step: int) -> torch.Tensor:
        """Compute the cross-entropy with what the last layer predicts."""
        targets = self._targets.read(first_row, len(token_ids))
        (states,) = self.draft_states(token_ids, self.exit_layers[0])
        return head_loss(states.flatten(0, 1), self._model.lm_head.weight, targets)

    def draft_states(self, token_ids: torch.Tensor, exit_layer: int) -> list[torch.Tensor]:
        """Return the adapted exit."""
        with torch.no_grad():
            states = run_prefix(self._model, token_ids, exit_layer)
        return [self.trained(states)]


class DraftLoraLearner:
    """A draft LoRA on a frozen model, trained on chains of drafts.

    A step's rows are cut into rounds of K drafts, as serving would draft them if all were accepted:
    each place is one draft of a round, the first, the second and so on by turns over the steps.
    """

    changes_model = False
    learning_rate, weight_decay = 1.5e-3, 0.0

    def __init__(self, model: Any, exit_layer: int, targets: TargetFile) -> None:
        self._model, self._targets = model, targets
        self.exit_layers: tuple[int, ...] = (exit_layer,)
        layers = model.model.layers[:exit_layer]
        self._lora = DraftLora(layers, model.config.hidden_size, LORA_RANK, seed=0)
        self.trained: nn.Module = self._lora.to(model.device)

    def loss(self, token_ids: torch.Tensor, first_row: int, step: int) -> torch.Tensor:
        """Compute the cross-entropy with what the last layer predicts."""
        targets = self._targets.read(first_row, len(token_ids))
        keys_values = self._verify(token_ids)
        states = self._draft(token_ids, keys_values, step % NUM_SPECULATIVE_TOKENS)
        return head_loss(states.flatten(0, 1), self._model.lm_head.weight, targets)

    def draft_states(self, token_ids: torch.Tensor, exit_layer: int) -> list[torch.Tensor]:
        """Return the changed exit for each offset of the rounds."""
        keys_values = self._verify(token_ids)
        return [
            self._draft(token_ids, keys_values, offset) for offset in range(NUM_SPECULATIVE_TOKENS)
        ]

    @torch.no_grad()
    def _verify(self, token_ids: torch.Tensor) -> KeysValues:
        """Return the unchanged layers' keys and values."""
        keys_values = KeysValues()
        run_prefix(self._model, token_ids, self.exit_layers[0], keys_values)
        return keys_values

    def _draft(self, token_ids: torch.Tensor, keys_values: KeysValues, offset: int) -> torch.Tensor:
        mask = make_draft_mask(token_ids.shape[1], offset, NUM_SPECULATIVE_TOKENS)
        mask = mask.to(token_ids.device)
        with self._lora.on():
            states = run_prefix(self._model, token_ids, self.exit_layers[0], keys_values, mask)
        changed: torch.Tensor = self._lora(states)
        return changed
