"""LayerSkip on a transformers model: its training `forward` skips layers and sums exits' losses.

`LayerSkipTrainer` enters it for the time of a training; another training loop can do the same. It
works inside the model's own `forward`, where FSDP and DeepSpeed have the weights gathered.
"""

import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from layerskip_vllm.training.decoder import (
    capture_layer_outputs,
    find_decoder_parts,
    replace_forward,
)
from layerskip_vllm.training.early_exit_loss import next_token_labels
from layerskip_vllm.training.layer_dropout import LayerDropout
from layerskip_vllm.training.settings import LayerSkipSettings


class LayerSkip:
    """Layer dropout and early exit loss for one model, inside a `with`.

        with LayerSkip(model, settings) as layer_skip:
            for step, batch in enumerate(batches):
                layer_skip.set_step(step, len(batches))
                model(**batch, labels=batch["input_ids"]).loss.backward()

    A forward pass with labels in training mode returns the early exit loss and no logits. In eval
    mode, without labels and outside of the `with` the model does what it always does. It may have
    peft's adapters. `ValueError` if it has no decoder layers, or the settings do not fit it.
    """

    def __init__(self, model: Any, settings: LayerSkipSettings) -> None:
        self.parts = find_decoder_parts(model)
        self.model = self.parts.model
        self.num_layers = len(self.parts.layers)
        # Each exit's loss in the last training forward, by its E, `[] float32`.
        self.exit_losses: dict[int, torch.Tensor] = {}
        self.is_on = False
        settings.check_fits(self.num_layers)
        if getattr(self.model.config, "output_router_logits", False):
            raise ValueError(
                "output_router_logits is true in the model's config, but the experts' balancing "
                "loss is no part of the early exit loss; set it to false."
            )
        # A loop that trains in phases may put another in its place.
        self.exit_loss = settings.make_exit_loss(self.parts)
        self._dropout = LayerDropout(self.parts.layers, settings)
        self._undo: Callable[[], None] | None = None
        self.set_step(0, 1)

    def __enter__(self) -> Self:
        self._dropout.__enter__()
        if self._undo is None:
            self._undo = replace_forward(self.model, self._wrap(self.model.forward))
            self._forward = self.model.forward
        self.is_on = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_on = False
        self._dropout.__exit__()
        # Where accelerate has wrapped `forward` since, this one stays inside and passes through.
        if self._undo is not None and self.model.forward is self._forward:
            self._undo()
            self._undo = None

    def set_step(self, step: int, num_steps: int, micro_batch: int = 0) -> None:
        """Say which of the training's optimizer steps, from 0, the coming forward passes are.

        `micro_batch` is which of the step's passes it is, if gradients are accumulated.
        """
        self._step, self._num_steps = step, num_steps
        self._dropout.set_step(step, num_steps, micro_batch)

    def _wrap(self, plain_forward: Callable[..., Any]) -> Callable[..., Any]:
        # transformers' Trainer reads the signature to learn what a model takes.
        @functools.wraps(plain_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            has_labels = kwargs.get("labels") is not None
            if not (self.is_on and self.model.training and has_labels):
                return plain_forward(*args, **kwargs)
            return CausalLMOutputWithPast(loss=self._compute_loss(*args, **kwargs))

        return forward

    def _compute_loss(
        self,
        *args: Any,
        labels: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the weighted loss, `[] float32`, of a forward pass with the model's arguments."""
        self._check_checkpointing()
        if shift_labels is None:
            shift_labels = next_token_labels(labels)
        kwargs["use_cache"] = False
        layer_indices = self.exit_loss.active_layers(self._step, self._num_steps)
        with capture_layer_outputs(self.parts.layers, layer_indices) as outputs:
            self.parts.decoder(*args, **kwargs)
        loss, losses = self.exit_loss.compute(outputs, shift_labels, num_items_in_batch)
        self.exit_losses = {layer_idx + 1: exit_loss for layer_idx, exit_loss in losses.items()}
        return loss

    def _check_checkpointing(self) -> None:
        """Refuse layers that are checkpointed in the way that gives exits no gradient."""
        for layer in self.parts.layers:
            keywords = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
            is_checkpointed = getattr(layer, "gradient_checkpointing", False)
            if is_checkpointed and keywords.get("use_reentrant", True):
                raise ValueError(
                    "use_reentrant is not false in gradient_checkpointing_kwargs; exits would get "
                    "no gradient. Set it to false."
                )
