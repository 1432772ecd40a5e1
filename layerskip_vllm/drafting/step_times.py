"""What steps take by batch size and number of drafts, learned from those that were run.

Part of `draft_lengths`: in the engine core, plain Python.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

import numpy as np

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
    middle: float | None = None  # their median, None if there are too few
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))

    def add(self, seconds: float, now: int) -> None:
        if now - self.taken_at > _STALE_AFTER and self.seconds:
            self.seconds = deque([self.seconds[-1]], maxlen=_NUM_KEPT)
        self.seconds.append(seconds)
        self.taken_at = now
        # Here, once a step: each step asks for those of many numbers of drafts.
        is_enough = len(self.seconds) >= _NUM_NEEDED
        self.middle = statistics.median_low(self.seconds) if is_enough else None

    def median(self, now: int) -> float | None:
        """Return the median, None if there are too few or all are too old."""
        return None if now - self.taken_at > _EXPIRES_AFTER else self.middle


@dataclass
class _BatchSize:
    num_steps: int = 0
    times: dict[int, _Times] = field(default_factory=dict)  # by number of drafts

    def median(self, num_drafts: int) -> float | None:
        times = self.times.get(num_drafts)
        return None if times is None else times.median(self.num_steps)


class StepTimeTable:
    """Times of steps that verify as many drafts as they make."""

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

        One that is not known here is what it is at the nearest batch size that knows it, as much
        more or less as those are that both know. Else it is on the line between known ones, or on
        the last of those lines, but at best what the bytes allow, so that whatever may pay is
        tried. It is infinite where it is too early: more than twice the longest known and one.
        """
        key = _size_of(batch_size)
        known = self._known(key)
        own = dict(known)
        for distance in range(1, _SIZES_PER_OCTAVE + 1):
            for near in (self._known(key + distance), self._known(key - distance)):
                missing = near.keys() - known.keys()
                if not missing:
                    continue
                # What drafting adds to a step here, by what it adds there.
                more = [(own[k] - 1) / (near[k] - 1) for k in near if k in own and near[k] > 1]
                scale = max(0.0, statistics.median(more)) if more else 1.0
                for k in missing:
                    known[k] = 1 + (near[k] - 1) * scale
        known[0] = 1.0
        lengths = sorted(known)
        *_, last = lengths
        per_draft = min([self._draft_share, *((known[k] - 1) / k for k in lengths[1:])])
        times: list[float] = np.interp(
            range(last + 1), lengths, [known[k] for k in lengths]
        ).tolist()
        for k in range(last + 1, self._max_num_drafts + 1):
            if len(lengths) > 2:
                slope = (known[last] - known[lengths[-2]]) / (last - lengths[-2])
                times.append(known[last] + (k - last) * max(per_draft, slope))
            else:
                times.append(max(known[last], 1 + k * per_draft))
            if k > 2 * last + 1:
                times[-1] = math.inf
        return times

    def _known(self, key: int) -> dict[int, float]:
        """Return the known times of a batch size by number of drafts, in steps without any."""
        if key not in self._sizes:
            return {}
        ratios = {k: self._ratio(key, k) for k in range(1, self._max_num_drafts + 1)}
        return {k: ratio for k, ratio in ratios.items() if ratio is not None}

    def _ratio(self, key: int, num_drafts: int) -> float | None:
        size = self._sizes.get(key)
        if size is None:
            return None
        plain, drafted = size.median(0), size.median(num_drafts)
        return None if plain is None or drafted is None else drafted / plain


def _size_of(batch_size: int) -> int:
    return round(_SIZES_PER_OCTAVE * math.log2(batch_size))
