"""One curve's training: its steps, its points and the file that it goes on from.

Used by `three_curves`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.training.curve_learners import Learner

FIRST_POINT = 2**15  # tokens; then every time that they have grown by the root of two
NUM_WARMUP_STEPS = 20
MAX_AVERAGE_DECAY = 0.99  # of the weights that are measured, which are a mean of the last steps'
SAVE_EVERY_S = 240.0
STEPS_PER_LINE = 32


@dataclass
class Curve:
    """A learner with all that its training goes on from."""

    learner: Learner
    file: Path
    step: int = 0
    points: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._weights: list[torch.Tensor] = list(self.learner.trained.parameters())
        self._average = [weight.detach().clone() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._weights,
            lr=self.learner.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=self.learner.weight_decay,
            fused=True,
        )
        if self.file.exists():
            self._load()

    def train_step(self, token_ids: torch.Tensor, first_row: int) -> float:
        """Learn from some rows; returns the loss."""
        warmup = min(1.0, (self.step + 1) / NUM_WARMUP_STEPS)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learner.learning_rate * warmup
        loss = self.learner.loss(token_ids, first_row, self.step)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        decay = min(MAX_AVERAGE_DECAY, self.step / (self.step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._weights, 1 - decay)
        return loss.item()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averaged weights in the learner for the time of a `with`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save(self) -> None:
        """Write the state, whole or not at all."""
        unfinished = self.file.with_suffix(".unfinished")
        state = {
            "step": self.step,
            "points": self.points,
            "weights": [weight.detach() for weight in self._weights],
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, unfinished)
        os.replace(unfinished, self.file)

    def _load(self) -> None:
        state = torch.load(self.file, map_location=self._weights[0].device, weights_only=True)
        self.step, self.points = state["step"], state["points"]
        with torch.no_grad():
            torch._foreach_copy_(self._weights, state["weights"])
            torch._foreach_copy_(self._average, state["average"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _swap(self) -> None:
        for weight, average in zip(self._weights, self._average, strict=True):
            weight.data, average.data = average.data, weight.data


class StopRequest:
    """Notes SIGTERM, so that a run ends where nothing is lost.

    Used as a signal's handler. At most one step is finished first; where `can_leave` is set, as
    nothing would be lost, not even that.
    """

    def __init__(self) -> None:
        self.is_made = False
        self.can_leave = True

    def __call__(self, *_: object) -> None:
        """Hear the signal."""
        self.is_made = True
        if self.can_leave:
            raise SystemExit


def train_curve(
    curve: Curve,
    rows: torch.Tensor,
    rows_per_step: int,
    num_tokens: int,
    measure: Callable[[], Sequence[Mapping[str, Any]]],
    stop: StopRequest,
) -> None:
    """Train to `num_tokens`, with a point of `measure` wherever one is due.

    The rows are learned again when there are no more of them.
    """
    steps_per_pass = len(rows) // rows_per_step
    tokens_per_step = rows_per_step * rows.shape[1]
    losses, steps_begun = 0.0, curve.step
    saved_at = began = time.monotonic()
    stop.can_leave = False
    while not stop.is_made:
        tokens = curve.step * tokens_per_step
        is_last = tokens >= num_tokens
        last_point = curve.points[-1]["tokens"] if curve.points else -1
        if _count_points(tokens) > _count_points(last_point) or is_last:
            curve.save()
            if tokens > last_point:
                stop.can_leave = True
                with curve.averaged():
                    measured = measure()
                stop.can_leave = False
                curve.points += [{"tokens": tokens, **point} for point in measured]
                print(f"{curve.file.stem}: {curve.points[-1]}", flush=True)
                curve.save()
            saved_at = began = time.monotonic()
            steps_begun, losses = curve.step, 0.0
        if is_last:
            return
        first_row = curve.step % steps_per_pass * rows_per_step
        losses += curve.train_step(rows[first_row : first_row + rows_per_step], first_row)
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            curve.save()
            saved_at = time.monotonic()
        if (num := curve.step - steps_begun) % STEPS_PER_LINE == 0:
            rate = num * tokens_per_step / (time.monotonic() - began)
            line = f"{curve.step * tokens_per_step:,} tokens, {rate:,.0f} a second"
            print(f"{curve.file.stem}: {line}, loss {losses / num:.3f}", flush=True)
    curve.save()


def _count_points(tokens: int) -> int:
    """Return how many points are due by a number of tokens, none before the first."""
    if tokens < FIRST_POINT:
        return min(tokens, 0) + 1
    return 2 + math.floor(2 * math.log2(tokens / FIRST_POINT))
