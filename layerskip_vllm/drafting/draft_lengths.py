"""How many tokens a step drafts where that is "auto": what promises most tokens a second.

In the engine core, around the scheduler's steps (`request_limits`), so that it is the same for both
model runners and all ranks. Plain Python, with a clock that tests may set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from layerskip_vllm.drafting.acceptance import DraftResult, RequestAcceptance
from layerskip_vllm.drafting.step_times import StepTimeTable

# Another length must promise so much more than the one in use, and drafts so much more than none:
# they let some requests end before others, and leave smaller batches behind.
_GAIN_TO_CHANGE = 0.01
_GAIN_TO_DRAFT = 0.02
# Probes: the share of the time that they may lose, how long they last, and what is between two.
_PROBE_SHARE = 0.004
_PROBE_STEPS = 3
_MAX_PROBE_STEPS = 10  # where drafts are accepted
_STEPS_BETWEEN_PROBES = 12
# How long steps without drafts are waited for that can be timed: prompts may be in all of them.
_MAX_WAIT = 8
# After so many steps none of which decoded alone, the others are timed too.
_MAX_UNTIMED = 32


@dataclass(frozen=True)
class _Step:
    ended_at: float
    num_drafts: int
    request_ids: frozenset[str]
    is_decode: bool

    def follows(self, last: _Step) -> bool:
        """Whether the time since `last` is this one's alone: the engine had no pause in between."""
        return self.num_drafts == last.num_drafts and not self.request_ids.isdisjoint(
            last.request_ids
        )

    def is_pure(self, last: _Step) -> bool:
        """Whether both decoded alone, the same requests but for those that have ended."""
        return self.is_decode and last.is_decode and self.request_ids <= last.request_ids


class DraftLengths:
    """Chooses the number of drafts of each step, by what steps took and what was accepted.

    A step of k drafts takes T(b, k) at batch size b, and yields 1 + a + a^2 .. + a^k tokens for a
    request whose drafts are accepted at rate a. Chosen is the k with most tokens by time. Each T is
    measured while requests are served; T(b, 0) before any other.

    Now and then a probe takes the other side for a few steps, no drafts where there are some, one
    where there are none, so that neither a rate nor a time stays as it once was.

    Attributes:
        num_drafted: How many tokens the last step that was observed has drafted.
    """

    num_drafted: int

    def __init__(
        self,
        max_num_drafts: int,
        draft_share: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start with nothing learned.

        Args:
            max_num_drafts: The most drafts of a step.
            draft_share: What a draft step reads of the model's weights, 0 to 1.
            clock: Returns the time in seconds.
        """
        self.num_drafted = 0
        self._acceptance = RequestAcceptance(max_num_drafts)
        self._times = StepTimeTable(max_num_drafts, draft_share)
        self._clock = clock
        self._last: _Step | None = None
        self._num_drafts = 0  # what was chosen last, probes aside
        self._num_waits = 0
        self._num_untimed = 0  # steps since one that decoded alone was timed
        self._num_probe_steps = 0
        self._num_since_probe = 0
        self._probe_budget = 2.0  # in steps that may be lost
        self._is_promising = False  # at least half of the last step's drafts were accepted

    def observe(self, num_drafts: int, results: Mapping[str, DraftResult], is_decode: bool) -> None:
        """Take in a step that has just ended.

        Args:
            num_drafts: How many tokens it drafted for the next.
            results: What became of the drafts that it verified, by request.
            is_decode: Whether all its requests were past their prompts.
        """
        last, self.num_drafted = self._last, num_drafts
        step = _Step(self._clock(), num_drafts, frozenset(results), is_decode)
        self._last = step
        self._num_untimed += 1
        if last is not None and step.follows(last) and step.ended_at > last.ended_at:
            is_pure = step.is_pure(last)
            if is_pure or self._num_untimed > _MAX_UNTIMED:
                self._times.observe(len(results), num_drafts, step.ended_at - last.ended_at)
                self._num_waits = 0
            if is_pure:
                self._num_untimed = 0
        self._acceptance.observe(results)
        num_accepted = sum(result.num_accepted for result in results.values())
        total = sum(result.num_drafts for result in results.values())
        self._is_promising = 2 * num_accepted >= total > 0

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop requests that have ended."""
        self._acceptance.forget(request_ids)

    def choose(self, limits: Mapping[str, int]) -> int:
        """Choose how many tokens the step that has just been scheduled drafts.

        Args:
            limits: The requests that will decode after it, at least one, and how many tokens each
                drafts at most.

        Returns:
            The number, 0 to the most that there can be.
        """
        batch_size = len(limits)
        if not self._times.is_known(batch_size, 0) and self._num_waits < _MAX_WAIT:
            self._num_waits += 1
            return 0
        times = self._times.relative(batch_size)
        tokens = self._acceptance.expected_tokens(limits)
        costs = [each / num for each, num in zip(times, tokens, strict=True)]
        costs[0] /= 1 + _GAIN_TO_DRAFT
        best = min(range(len(costs)), key=costs.__getitem__)
        if costs[self._num_drafts] > costs[best] * (1 + _GAIN_TO_CHANGE):
            self._num_drafts = best
            self._num_probe_steps = 0  # it has been answered
        num_drafts = self._num_drafts
        # What a step with other than the chosen number would lose, in steps with it.
        others = [0]
        if num_drafts == 0:
            is_known = self._times.is_known
            others = [k for k in range(1, len(costs)) if k == 1 or is_known(batch_size, k)]
        lost, other = min((times[k] - tokens[k] * costs[num_drafts], k) for k in others)
        lost = max(0.0, lost / times[num_drafts])
        return other if self._is_probe(lost, is_drafting=other > 0) else num_drafts

    def _is_probe(self, lost: float, is_drafting: bool) -> bool:
        """Return whether this step probes, which loses the time of so many steps."""
        if self._num_probe_steps == 0:
            self._num_since_probe += 1
            price = _PROBE_STEPS * lost
            self._probe_budget = min(self._probe_budget + _PROBE_SHARE, price)
            if self._num_since_probe <= _STEPS_BETWEEN_PROBES or self._probe_budget < price:
                return False
        # While drafts are accepted it goes on, until they are worth it by themselves.
        is_longer = is_drafting and self._is_promising
        if self._num_probe_steps >= (_MAX_PROBE_STEPS if is_longer else _PROBE_STEPS):
            self._num_probe_steps = self._num_since_probe = 0
            return False
        self._num_probe_steps += 1
        self._probe_budget -= lost
        return True
