"""What steps take by batch size and number of drafts, learned from those that were run.

Part of `draft_lengths`: in the engine core, plain Python.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

_NUM_KEPT = 16
# A single one may have been disturbed. Of two the shorter counts.
_NUM_NEEDED = 2
# Steps of a batch size after which a time is no longer trusted beside new ones, or at all.
_STALE_AFTER = 64
_EXPIRES_AFTER = 1000
# Batch sizes are told apart by a fifth, and borrow from those up to twice as large or small.
_SIZES_PER_OCTAVE = 4


@dataclass
class _Times:
    """The last few of one batch size and one number of drafts, in seconds."""

    taken_at: int = 0  # the number of the batch size's step
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))

    def add(self, seconds: float, now: int) -> None:
        if now - self.taken_at > _STALE_AFTER and self.seconds:
            self.seconds = deque([self.seconds[-1]], maxlen=_NUM_KEPT)
        self.seconds.append(seconds)
        self.taken_at = now

    def median(self, now: int) -> float | None:
        """Return the median, None if there are too few or all are too old."""
        if len(self.seconds) < _NUM_NEEDED or now - self.taken_at > _EXPIRES_AFTER:
            return None
        return statistics.median_low(self.seconds)


@dataclass
class _BatchSize:
    num_steps: int = 0
    times: dict[int, _Times] = field(default_factory=dict)  # by number of drafts

    def median(self, num_drafts: int) -> float | None:
        times = self.times.get(num_drafts)
        return None if times is None else times.median(self.num_steps)


class StepTimeTable:
    """Times of steps that decode alone and verify as many drafts as they make."""

    def __init__(self, max_num_drafts: int, draft_share: float) -> None:
        """Know nothing but the bytes.

        Args:
            max_num_drafts: The most drafts of a step.
            draft_share: What a draft step reads of the model's weights, 0 to 1: its least time, in
                steps without drafts.
        """
        self._max_num_drafts = max_num_drafts
        self._draft_share = draft_share
        self._sizes: dict[int, _BatchSize] = {}

    def observe(self, batch_size: int, num_drafts: int, seconds: float) -> None:
        """Take in a step's time."""
        size = self._sizes.setdefault(_size_of(batch_size), _BatchSize())
        size.num_steps += 1
        size.times.setdefault(num_drafts, _Times()).add(seconds, size.num_steps)

    def is_known(self, batch_size: int, num_drafts: int) -> bool:
        """Return whether such steps were timed lately."""
        return self._ratio(_size_of(batch_size), num_drafts) is not None

    def relative(self, batch_size: int) -> list[float]:
        """Return the times by number of drafts, in steps without any.

        One that is not known here is what it is at the nearest batch size that knows it. Else it is
        at best what the bytes allow, or the known ones, so that whatever may pay is tried; infinite
        if it is more than twice the longest that is known, for which it is too early.
        """
        key = _size_of(batch_size)
        distances = range(1, _SIZES_PER_OCTAVE + 1)
        keys = [key, *(near for d in distances for near in (key + d, key - d))]
        keys = [each for each in keys if each in self._sizes]
        known = {0: 1.0}
        for num_drafts in range(1, self._max_num_drafts + 1):
            ratios = (self._ratio(each, num_drafts) for each in keys)
            ratio = next((each for each in ratios if each is not None), None)
            if ratio is not None:
                known[num_drafts] = ratio
        per_draft = min([self._draft_share, *((known[k] - 1) / k for k in known if k > 0)])
        longest, times = 2 * max(known) + 1, []
        for k in range(self._max_num_drafts + 1):
            at_least = max([1 + k * per_draft, *(known[i] for i in known if i < k)])
            times.append(known.get(k, at_least if k <= longest else math.inf))
        return times

    def _ratio(self, key: int, num_drafts: int) -> float | None:
        size = self._sizes.get(key)
        if size is None:
            return None
        plain, drafted = size.median(0), size.median(num_drafts)
        return None if plain is None or drafted is None else drafted / plain


def _size_of(batch_size: int) -> int:
    return round(_SIZES_PER_OCTAVE * math.log2(batch_size))
