"""Comparing what two engines said, token by token."""

from __future__ import annotations

from collections.abc import Sequence


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """Return where two completions differ first; the shorter one's length where nothing differs."""
    pairs = zip(left, right, strict=False)
    differences = (at for at, (here, there) in enumerate(pairs) if here != there)
    return next(differences, min(len(left), len(right)))
