"""Early exit loss: the model's one head is trained to read every layer's output.

The trainer captures the outputs of a Hugging Face model's decoder layers, and this module turns
them into one weighted loss. Layer l's exit reads x_{l+1}, that layer's *output*, through the final
norm and the head.

Source: LayerSkip, arXiv 2404.16710, section 4.1.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from layerskip_vllm.training.decoder import DecoderParts

ExitScale = Literal["sum", "flat"]
ExitTarget = Literal["labels", "last_layer"]
IGNORED_LABEL = -100  # what `cross_entropy` leaves out


class ExitCurriculum(ABC):
    """Chooses the exits whose loss counts at a training step. The last layer's always does."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    @abstractmethod
    def is_active(self, layer_idx: int, step: int) -> bool:
        """Returns whether the exit after layer `layer_idx`, not the last one, is on at `step`."""

    def active_layers(self, step: int) -> list[int]:
        """Returns the layers whose exits are on at `step`, ascending, the last layer among them."""
        last = self.num_layers - 1
        return [i for i in range(last) if self.is_active(i, step)] + [last]


class NoCurriculum(ExitCurriculum):
    """Every exit is on at every step."""

    def is_active(self, layer_idx: int, step: int) -> bool:
        """Returns True."""
        return True


class RotationalCurriculum(ExitCurriculum):
    """Every `interval`-th exit is on, and the set moves up by one layer at each step.

    Differs: the paper does not say that the last layer is on at every step. With an interval near
    the number of layers most steps would otherwise train one middle exit and nothing else.

    Args:
        num_layers: Layers of the model.
        interval: R, the steps until an exit is on again.

    Raises:
        ValueError: `interval` is not positive.
    """

    def __init__(self, num_layers: int, interval: int) -> None:
        super().__init__(num_layers)
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}.")
        self.interval = interval

    def is_active(self, layer_idx: int, step: int) -> bool:
        """Returns whether it is the turn of `layer_idx` and those an interval apart from it."""
        return layer_idx % self.interval == step % self.interval


class GradualCurriculum(ExitCurriculum):
    """Exits are switched on from the last to the first, one more every T / (2 L) steps.

    Args:
        num_layers: Layers of the model.
        num_steps: T, the steps of the whole training; all exits are on from its half.
    """

    def __init__(self, num_layers: int, num_steps: int) -> None:
        super().__init__(num_layers)
        self.num_steps = num_steps

    def is_active(self, layer_idx: int, step: int) -> bool:
        """Returns whether the switching on has come down to `layer_idx`."""
        return 2 * self.num_layers * step >= (self.num_layers - 1 - layer_idx) * self.num_steps


def exit_scales(num_layers: int, e_scale: float, kind: ExitScale = "sum") -> list[float]:
    """Returns e(l), each exit's weight before they are normalized, for all layers.

    "sum", the paper's, is e_scale * (0 + 1 + ... + l), with L - 1 added for the last layer, whose
    sum ends at L - 2. Late exits weigh far more than early ones, and the first layer's nothing.

    Differs: "flat" is e_scale for every exit and 1 for the last layer. An early exit then has a
    share that is large enough to learn from few tokens.

    Args:
        num_layers: L.
        e_scale: How much the exits weigh against the last layer, 0 to 1.
        kind: Which of the two.

    Returns:
        `num_layers` weights, the first layer's first.

    Raises:
        ValueError: `e_scale` is not in [0, 1], or there is no such `kind`.
    """
    if not 0.0 <= e_scale <= 1.0:
        raise ValueError(f"e_scale must be in [0, 1], got {e_scale}.")
    if kind not in get_args(ExitScale):
        raise ValueError(f"kind must be one of {get_args(ExitScale)}, got {kind!r}.")
    last = num_layers - 1
    if kind == "flat":
        return [e_scale] * last + [1.0]
    scales = [e_scale * layer_idx * (layer_idx + 1) / 2 for layer_idx in range(last)]
    return [*scales, last + e_scale * (last - 1) * last / 2]


def exit_shares(scales: Sequence[float], active_layers: Sequence[int]) -> dict[int, float]:
    """Returns each active exit's share of the loss; the shares sum to 1."""
    total = sum(scales[i] for i in active_layers)
    return {i: scales[i] / total for i in active_layers}


class EarlyExitLoss:
    """The weighted sum of the active exits' next-token losses.

    Exits are unembedded one at a time. With `recompute_logits` their logits are not kept for the
    backward pass either, so memory holds one exit's logits however many exits are on.

    Args:
        parts: The model's parts.
        scales: e(l) for every layer, see `exit_scales`.
        curriculum: Which exits are on at which step.
        exit_layers: Layers that may have an exit, next to the last; all when None. Differs: in the
            paper all layers do.
        recompute_logits: Whether to compute logits again in the backward pass.
        target: What the exits below the last layer learn to predict: the "labels", as in the paper,
            or, different from it, what the "last_layer" predicts, which is what drafts are accepted
            by. The last layer learns the labels, and nothing from its exits' losses.

    Raises:
        ValueError: There is no such `target`.
    """

    def __init__(
        self,
        parts: DecoderParts,
        scales: Sequence[float],
        curriculum: ExitCurriculum,
        exit_layers: Iterable[int] | None = None,
        recompute_logits: bool = False,
        target: ExitTarget = "labels",
    ) -> None:
        if target not in get_args(ExitTarget):
            raise ValueError(f"target must be one of {get_args(ExitTarget)}, got {target!r}.")
        self.target = target
        self.parts = parts
        self.scales = list(scales)
        self.curriculum = curriculum
        self.exit_layers = None if exit_layers is None else frozenset(exit_layers)
        self.recompute_logits = recompute_logits

    def active_layers(self, step: int) -> list[int]:
        """Returns the layers whose outputs `compute` needs at `step`, without those of weight 0."""
        last = len(self.scales) - 1
        return [
            i
            for i in self.curriculum.active_layers(step)
            if i == last
            or (self.scales[i] > 0 and (self.exit_layers is None or i in self.exit_layers))
        ]

    def compute(
        self,
        layer_outputs: Mapping[int, torch.Tensor],
        labels: torch.Tensor,
        step: int,
        num_labels: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Returns the loss to train on, and each active exit's own loss.

        Args:
            layer_outputs: Layer index to x_{l+1}, `[batch_size, seq_len, hidden_size]`.
            labels: `[batch_size, seq_len] int64`, the token to predict at each place (shifted
                already), -100 where there is none.
            step: The training step, for the curriculum.
            num_labels: What sums over tokens are divided by: when gradients are accumulated, the
                labels of all of the step's micro-batches. Those of this one when None.

        Returns:
            The weighted loss, `[] float32`, and layer index to that exit's cross-entropy with its
            target, `[] float32`, detached.
        """
        shares = exit_shares(self.scales, self.active_layers(step))
        last = len(self.scales) - 1
        soft_labels = None
        if self.target == "last_layer":
            with torch.no_grad():
                soft_labels = self._logits(layer_outputs[last]).softmax(-1)
        losses: dict[int, torch.Tensor] = {}
        total = torch.zeros((), device=labels.device)
        for layer_idx, share in shares.items():
            arguments = (
                layer_outputs[layer_idx],
                labels,
                None if layer_idx == last else soft_labels,
                num_labels,
            )
            if self.recompute_logits:
                loss = checkpoint(self._exit_loss, *arguments, use_reentrant=False)
            else:
                loss = self._exit_loss(*arguments)
            total = total + share * loss
            losses[layer_idx] = loss.detach()
        return total, losses

    def _exit_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        soft_labels: torch.Tensor | None,
        num_labels: torch.Tensor | int | None,
    ) -> torch.Tensor:
        return exit_loss(self._logits(hidden_states), labels, soft_labels, num_labels)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch_size * seq_len, vocab_size] float32`."""
        return self.parts.compute_logits(hidden_states).float().flatten(0, -2)


def next_token_labels(labels: torch.Tensor) -> torch.Tensor:
    """Returns labels moved to where they are predicted, `[batch_size, seq_len] int64`."""
    return functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]


def exit_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    soft_labels: torch.Tensor | None = None,
    num_labels: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Returns one exit's cross-entropy with its target.

    Args:
        logits: `[batch_size * seq_len, vocab_size] float32`.
        labels: `[batch_size, seq_len] int64`, the token to predict at each place, -100 where there
            is none.
        soft_labels: `[batch_size * seq_len, vocab_size] float32`, the probabilities to predict
            where there is a label, or None to predict the label.
        num_labels: What the sum over tokens is divided by; the number of labels when None.

    Returns:
        `[] float32`.
    """
    labels = labels.flatten()
    reduction = "mean" if num_labels is None else "sum"
    if soft_labels is None:
        loss = functional.cross_entropy(logits, labels, reduction=reduction)
    else:
        is_label = labels != IGNORED_LABEL
        loss = functional.cross_entropy(
            logits[is_label], soft_labels[is_label], reduction=reduction
        )
    return loss if num_labels is None else loss / num_labels
