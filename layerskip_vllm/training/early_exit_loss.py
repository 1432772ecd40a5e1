"""Early exit loss: the model's one head is trained to read every layer's output.

`LayerSkip` captures the outputs of the decoder layers, of which this makes one weighted loss.
Layer l's exit reads x_{l+1}, that layer's *output*, through the final norm and the head.

Source: LayerSkip, arXiv 2404.16710, section 4.1.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from layerskip_vllm.training.decoder import DecoderParts

Curriculum = Literal["none", "rotational", "gradual"]
ExitScale = Literal["sum", "flat"]
ExitTarget = Literal["labels", "last_layer"]
IGNORED_LABEL = -100  # what `cross_entropy` leaves out


def is_exit_on(
    curriculum: Curriculum,
    layer_idx: int,
    num_layers: int,
    step: int,
    num_steps: int,
    rotation: int,
) -> bool:
    """Say whether the exit after a layer has a loss at a training step; the last always has.

    "none" has every exit on at every step. "rotational" has every R-th exit on, and the set moves
    up by one layer at each step. "gradual" switches exits on from the last to the first, one more
    every T / (2 L) steps, all from T / 2 on.

    Differs: the paper does not say that the last layer is on at every step. With R near the number
    of layers most steps would otherwise train one middle exit and nothing else.

    `layer_idx` is l and `step` is t, both from 0; `num_layers` is L, `num_steps` T, `rotation` R.
    """
    last = num_layers - 1
    if curriculum == "none" or layer_idx == last:
        return True
    if curriculum == "rotational":
        return layer_idx % rotation == step % rotation
    return 2 * num_layers * step >= (last - layer_idx) * num_steps


def exit_scales(num_layers: int, e_scale: float, kind: ExitScale = "sum") -> list[float]:
    """Return e(l), each exit's weight before they are normalized, for all layers, first to last.

    "sum", the paper's, is e_scale * (0 + 1 + ... + l), with L - 1 added for the last layer, whose
    sum ends at L - 2. Late exits weigh far more than early ones, and the first layer's nothing.

    Differs: "flat" is e_scale for every exit and 1 for the last layer. An early exit then has a
    share that is large enough to learn from few tokens.
    """
    last = num_layers - 1
    if kind == "flat":
        return [e_scale] * last + [1.0]
    scales = [e_scale * layer_idx * (layer_idx + 1) / 2 for layer_idx in range(last)]
    return [*scales, last + e_scale * (last - 1) * last / 2]


def exit_shares(scales: Sequence[float], layers: Collection[int]) -> dict[int, float]:
    """Return each active exit's share of the loss; the shares sum to 1."""
    total = sum(scales[i] for i in layers)
    return {i: scales[i] / total for i in layers}


@dataclass
class EarlyExitLoss:
    """The weighted sum of the active exits' next-token losses; see `LayerSkipSettings`.

    With the target "last_layer" the last layer learns the labels, and nothing from its exits'
    losses.
    """

    parts: DecoderParts
    scales: list[float]  # e(l) of each layer that runs, see `exit_scales`
    curriculum: Curriculum = "none"
    rotation: int = 1
    exit_layers: Collection[int] | None = None  # layer indices besides the last; all when None
    recompute_logits: bool = False
    target: ExitTarget = "labels"

    def active_layers(self, step: int, num_steps: int) -> list[int]:
        """Return the layers whose outputs `compute` needs, ascending, without those of weight 0."""
        num_layers = len(self.scales)
        return [
            i
            for i in range(num_layers)
            if is_exit_on(self.curriculum, i, num_layers, step, num_steps, self.rotation)
            and (
                i == num_layers - 1
                or (self.scales[i] > 0 and (self.exit_layers is None or i in self.exit_layers))
            )
        ]

    def compute(
        self,
        layer_outputs: Mapping[int, torch.Tensor],
        labels: torch.Tensor,
        num_labels: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Compute the loss to train on, and each active exit's own, detached; `[] float32`.

        Args:
            layer_outputs: Active layer to x_{l+1}, `[batch_size, seq_len, hidden_size]`.
            labels: `[batch_size, seq_len] int64`, the token to predict at each place (shifted
                already), -100 where there is none.
            num_labels: What sums over tokens are divided by: when gradients are accumulated, the
                labels of all of the step's micro-batches. Those of this one when None.

        Returns:
            The weighted loss, and layer index to that exit's cross-entropy with its target.
        """
        last = len(self.scales) - 1
        soft_labels = None
        if self.target == "last_layer":
            soft_labels = self.parts.predict(layer_outputs[last])
        losses: dict[int, torch.Tensor] = {}
        total = torch.zeros((), device=labels.device)
        for layer_idx, share in exit_shares(self.scales, layer_outputs.keys()).items():
            targets = None if layer_idx == last else soft_labels
            arguments = (self.parts, layer_outputs[layer_idx], labels, targets, num_labels)
            if self.recompute_logits:
                loss = checkpoint(exit_loss, *arguments, use_reentrant=False)
            else:
                loss = exit_loss(*arguments)
            total = total + share * loss
            losses[layer_idx] = loss.detach()
        return total, losses


def next_token_labels(labels: torch.Tensor) -> torch.Tensor:
    """Move labels to where they are predicted, `[batch_size, seq_len] int64`."""
    return functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]


def exit_loss(
    parts: DecoderParts,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    soft_labels: torch.Tensor | None = None,
    num_labels: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Compute one exit's cross-entropy with its target, `[] float32`; see `EarlyExitLoss.compute`.

    `soft_labels`, `[batch_size * seq_len, vocab_size] float32`, are probabilities to predict where
    there is a label; None predicts the label.
    """
    labels = labels.flatten()
    logits = parts.compute_logits(hidden_states).float().flatten(0, -2)
    reduction = "mean" if num_labels is None else "sum"
    if soft_labels is None:
        loss = functional.cross_entropy(logits, labels, reduction=reduction)
    else:
        is_label = labels != IGNORED_LABEL
        loss = functional.cross_entropy(
            logits[is_label], soft_labels[is_label], reduction=reduction
        )
    if isinstance(num_labels, torch.Tensor):
        num_labels = num_labels.to(labels.device)
    return loss if num_labels is None else loss / num_labels
