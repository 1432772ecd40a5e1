"""LayerSkip on a transformers model: its training `forward` skips layers and sums exits' losses.

`LayerSkipTrainer` attaches it for the time of a training; another training loop can do the same. It
works inside the model's own `forward`, where FSDP and DeepSpeed have the weights gathered.
"""

import functools
from typing import Any

import torch
from torch import nn
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
    """Layer dropout and early exit loss for one model.

    While attached, a forward pass with labels in training mode returns the early exit loss and no
    logits. In eval mode and without labels the model does what it always does.

    Args:
        model: A transformers causal language model, one with peft's adapters too.
        settings: How to train it.

    Attributes:
        model: The causal language model itself.
        num_layers: L.
        exit_losses: Each exit's loss in the last training forward, by its E, `[] float32`.
        is_attached: Whether the model trains with LayerSkip now.

    Raises:
        ValueError: The model has no decoder layers, or the settings do not fit it.
    """

    model: nn.Module
    num_layers: int
    exit_losses: dict[int, torch.Tensor]
    is_attached: bool

    def __init__(self, model: nn.Module, settings: LayerSkipSettings) -> None:
        self._parts = find_decoder_parts(model)
        self._settings = settings
        self.model = self._parts.model
        self.num_layers = len(self._parts.layers)
        self.exit_losses = {}
        settings.check_fits(self.num_layers)
        if getattr(self.model.config, "output_router_logits", False):
            raise ValueError(
                "output_router_logits is true in the model's config, but the experts' balancing "
                "loss is no part of the early exit loss; set it to false."
            )
        self._dropout = LayerDropout(self._parts.layers, settings.dropout_config(), num_steps=1)
        self._exit_loss = settings.make_exit_loss(self._parts, num_steps=1)
        self._step = 0
        self.is_attached = False
        self._is_installed = False

    def attach(self) -> "LayerSkip":
        """Has the model train with LayerSkip from now on.

        Returns:
            Itself.

        Raises:
            RuntimeError: It is attached already.
        """
        self._dropout.attach()
        if not self._is_installed:
            self._plain_forward = self.model.forward
            self._undo = replace_forward(self.model, self._make_forward())
            self._forward = self.model.forward
            self._is_installed = True
        self.is_attached = True
        return self

    def detach(self) -> None:
        """Has the model train plainly again."""
        self._dropout.detach()
        self.is_attached = False
        # Where accelerate has wrapped `forward` since, this one stays inside and passes through.
        if self._is_installed and self.model.forward is self._forward:
            self._undo()
            self._is_installed = False

    def start(self, num_steps: int) -> None:
        """Says how long the training is, and checks what can be seen only when it starts.

        Args:
            num_steps: T, the optimizer steps of the whole training.

        Raises:
            ValueError: The layers are checkpointed in the way that gives exits no gradient.
        """
        for layer in self._parts.layers:
            keywords = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
            is_checkpointed = getattr(layer, "gradient_checkpointing", False)
            if is_checkpointed and keywords.get("use_reentrant", True):
                raise ValueError(
                    "use_reentrant is not false in gradient_checkpointing_kwargs; exits would get "
                    "no gradient. Set it to false."
                )
        self._dropout.num_steps = num_steps
        self._exit_loss = self._settings.make_exit_loss(self._parts, num_steps)

    def set_step(self, step: int, micro_batch: int = 0) -> None:
        """Says which step the coming forward passes belong to.

        Args:
            step: The optimizer step, from 0.
            micro_batch: Which of the step's forward passes this is, if gradients are accumulated.
        """
        self._step = step
        self._dropout.set_step(step, micro_batch)

    def _make_forward(self) -> Any:
        plain_forward = self._plain_forward

        # transformers' Trainer reads the signature to learn what a model takes.
        @functools.wraps(plain_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            has_labels = kwargs.get("labels") is not None
            if not (self.is_attached and self.model.training and has_labels):
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
    ) -> torch.Tensor:
        """The weighted loss of a forward pass, `[] float32`; the arguments are the model's."""
        if shift_labels is None:
            shift_labels = next_token_labels(labels)
        kwargs["use_cache"] = False
        layer_indices = self._exit_loss.active_layers(self._step)
        with capture_layer_outputs(self._parts.layers, layer_indices) as outputs:
            self._parts.decoder(*args, **kwargs)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(labels.device)
        loss, losses = self._exit_loss.compute(
            outputs, shift_labels, self._step, num_items_in_batch
        )
        self.exit_losses = {layer_idx + 1: exit_loss for layer_idx, exit_loss in losses.items()}
        return loss
