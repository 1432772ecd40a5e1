"""Do two samples of token sequences come from one distribution? A chi-square test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tokens = tuple[int, ...]

# Cells with fewer sequences than this in both samples together are merged, so that the statistic
# follows the chi-square distribution into its tail.
MIN_CELL = 25


@dataclass(frozen=True)
class SampleComparison:
    """Two samples compared: the probability of such a difference if there is none, and its size."""

    p_value: float  # corrected for the number of positions looked at (Bonferroni)
    distance: float  # the largest total variation distance over the positions


def compare_samples(
    left: Sequence[Tokens], right: Sequence[Tokens], window: int = 2
) -> SampleComparison:
    """Compare two samples of sequences by their runs of `window` tokens at each position.

    All sequences have one length and are independent. A ValueError says that at no position there
    is more than one cell with enough of them in it.
    """
    num_positions = len(left[0]) - window + 1
    p_values, distances = [], []
    for start in range(num_positions):
        counts = [
            Counter(tokens[start : start + window] for tokens in sample) for sample in (left, right)
        ]
        cells = _merge_rare(*counts)
        if len(cells) > 1:
            p_values.append(_p_value(cells))
        distances.append(
            sum(abs(here / len(left) - there / len(right)) for here, there in cells) / 2
        )
    if not p_values:
        raise ValueError(
            f"too few sequences, or too much alike, for a comparison: {len(left)} and {len(right)}"
        )
    return SampleComparison(min(1.0, num_positions * min(p_values)), max(distances))


def _merge_rare(left: Counter[Tokens], right: Counter[Tokens]) -> list[tuple[int, int]]:
    """Count by cell; merge rare ones with their neighbours, in the order of their tokens."""
    cells, rare = [], (0, 0)
    for key in sorted(left.keys() | right.keys()):
        pair = (left[key], right[key])
        if sum(pair) < MIN_CELL:
            pair = (pair[0] + rare[0], pair[1] + rare[1])
            rare = (0, 0)
        if sum(pair) < MIN_CELL:
            rare = pair
        else:
            cells.append(pair)
    if sum(rare):
        here, there = cells.pop() if cells else (0, 0)
        cells.append((here + rare[0], there + rare[1]))
    return cells


def _p_value(cells: Sequence[tuple[int, int]]) -> float:
    num_left, num_right = (sum(column) for column in zip(*cells, strict=True))
    ratio = math.sqrt(num_right / num_left)
    statistic = sum((here * ratio - there / ratio) ** 2 / (here + there) for here, there in cells)
    degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))
