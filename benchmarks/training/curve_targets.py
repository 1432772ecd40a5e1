"""What exits of a frozen model learn to predict: the last layer's likeliest tokens, kept on disk.

All curves of a frozen model read the same file, which grows as the first of them goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.training.draft_lora import run_prefix

NUM_TOP_TOKENS = 64
MAX_LOGITS_AT_ONCE = 2**23
ROWS_AT_ONCE = 8


class TopTokens(NamedTuple):
    """The likeliest tokens at some places, with probabilities that sum to 1."""

    token_ids: torch.Tensor  # [num_places, NUM_TOP_TOKENS] int64
    probs: torch.Tensor  # [num_places, NUM_TOP_TOKENS] float32


class TargetFile:
    """The last layer's top tokens at each place of rows of text, computed once."""

    def __init__(self, file: Path, model: Any, rows: torch.Tensor) -> None:
        """Take the file, a frozen model and its text, `[num_rows, seq_len] int64`."""
        self._file, self._model, self._rows = file, model, rows
        self._num_top = min(NUM_TOP_TOKENS, model.config.vocab_size)
        shape = (rows.shape[1], self._num_top)
        self._record = np.dtype([("token_ids", "<i4", shape), ("probs", "<f2", shape)])

    def read(self, first: int, num_rows: int) -> TopTokens:
        """Read the targets of some rows, after computing what is not there."""
        while (num_there := self._count_rows()) < first + num_rows:
            self._append(num_there)
        records = np.fromfile(
            self._file, self._record, count=num_rows, offset=first * self._record.itemsize
        )
        device = self._rows.device
        token_ids = torch.from_numpy(records["token_ids"].astype(np.int64)).to(device)
        probs = torch.from_numpy(records["probs"].astype(np.float32)).to(device).flatten(0, 1)
        return TopTokens(token_ids.flatten(0, 1), probs / probs.sum(-1, keepdim=True))

    def _count_rows(self) -> int:
        return self._file.stat().st_size // self._record.itemsize if self._file.exists() else 0

    @torch.no_grad()
    def _append(self, first: int) -> None:
        rows = self._rows[first : first + ROWS_AT_ONCE]
        states = run_prefix(self._model, rows, self._model.config.num_hidden_layers).flatten(0, 1)
        parts = []
        for part in torch.split(states, _places_at_once(self._model.config.vocab_size)):
            logits = self._model.lm_head(part).float()
            parts.append(logits.softmax(-1).topk(self._num_top))
        records = np.empty(len(rows), self._record)
        for name, index in (("probs", 0), ("token_ids", 1)):
            found = torch.cat([part[index] for part in parts])
            records[name] = found.view(len(rows), *self._record[name].shape).cpu().numpy()
        with self._file.open("ab") as file:
            file.truncate(first * self._record.itemsize)  # what a killed run left of a row
            file.write(records.tobytes())


def _places_at_once(vocab_size: int) -> int:
    return max(1, MAX_LOGITS_AT_ONCE // vocab_size)


def head_loss(states: torch.Tensor, head: torch.Tensor, targets: TopTokens) -> torch.Tensor:
    """Compute the mean cross-entropy of a frozen head's predictions with their targets.

    Of `states`, `[num_places, hidden_size]`, through the head, `[vocab_size, hidden_size]`. All
    logits are never there at once, nor computed twice: the gradient is found with the loss.
    """
    loss: torch.Tensor = _HeadLoss.apply(states, head, *targets)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        head: torch.Tensor,
        token_ids: torch.Tensor,
        probs: torch.Tensor,
    ) -> torch.Tensor:
        size = _places_at_once(head.shape[0])
        total = torch.zeros((), device=states.device)
        gradient = torch.empty_like(states)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            logits = (states[part] @ head.T).float()
            logits -= logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, token_ids[part])
            sums = logits.exp_().sum(-1, keepdim=True)
            total += ((sums.log() - chosen) * probs[part]).sum()
            logits.div_(sums).scatter_add_(1, token_ids[part], -probs[part])
            gradient[part] = logits.to(head.dtype) @ head
        ctx.save_for_backward(gradient.div_(len(states)))
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None
