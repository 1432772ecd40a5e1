"""Designs tried for real: engines that take turns with plain vLLM, and what that says.

Part of `layerskip-vllm tune`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from layerskip_vllm.tools.tune.designs import Design, Speedups, geometric_mean
from layerskip_vllm.tools.tune.engines import TimedEngine

NUM_TURNS = 3
MAX_TRIALS = 6
# Tokens of a round: the most, and the fewest to which a short time may take them.
MAX_TOKENS = 128
_MIN_TOKENS = 32
_NUM_WARM_UP_TOKENS = 16
# Rounds of a turn and a batch size: plain vLLM, three K and perhaps a fourth; and the warm-up.
_ROUNDS_OF_A_TURN = 5
# "auto" follows the text too, which a schedule does not: it may be a little slower here.
_LEAST_OF_SCHEDULE = 0.99

Length = TypeVar("Length", int, None)


@dataclass(frozen=True)
class Trial:
    """A design that was tried."""

    predicted: Speedups
    measured: Speedups

    @property
    def design(self) -> Design:
        """What was tried."""
        return self.measured.design

    @property
    def lengths(self) -> dict[int, int]:
        """K by batch size: one for all, or where that is worth less, the best of each."""
        measured = self.measured
        if measured.follows_load:
            return measured.lengths
        return dict.fromkeys(measured.batch_sizes, measured.length)

    @property
    def speedups(self) -> dict[int, float]:
        """By batch size, in times plain vLLM, with these K."""
        return {b: self.measured.by_load[b, k] for b, k in self.lengths.items()}

    @property
    def score(self) -> float:
        """Their mean."""
        return geometric_mean(self.speedups.values())


@dataclass(frozen=True)
class TrialOutcome:
    """All trials, and the one with K "auto" where one K was not best in all batch sizes."""

    trials: Sequence[Trial]
    auto: Mapping[int, float] | None  # of the best design, by batch size

    @property
    def best(self) -> Trial:
        """The fastest trial."""
        return max(self.trials, key=lambda trial: trial.score)

    @property
    def is_auto(self) -> bool:
        """Whether K is left to the engine: about as fast as the best K of each batch size."""
        if self.auto is None:
            return False
        return geometric_mean(self.auto.values()) >= _LEAST_OF_SCHEDULE * self.best.score

    @property
    def speedups(self) -> Mapping[int, float]:
        """Of what is best, by batch size."""
        return self.auto if self.is_auto and self.auto is not None else self.best.speedups

    @property
    def pays(self) -> bool:
        """Whether it is faster than plain vLLM, on average over batch sizes."""
        return geometric_mean(self.speedups.values()) > 1


@dataclass(frozen=True)
class TrialPlan:
    """How much is tried."""

    num_trials: int
    max_tokens: int  # of a round
    seconds: float  # that a trial is thought to take


def plan_trials(plain: Mapping[int, float], start_s: float, seconds: float) -> TrialPlan:
    """Plan trials for so many seconds.

    Rounds get shorter before trials get fewer than four; one trial there always is, and time for
    another is left to K "auto". `plain` is what a step of plain vLLM takes by batch size, than
    which drafts are thought to be no slower.
    """
    step_s = (NUM_TURNS + 1) * _ROUNDS_OF_A_TURN * sum(plain.values())
    max_tokens = MAX_TOKENS
    while max_tokens > _MIN_TOKENS and seconds < 5 * (start_s + max_tokens * step_s):
        max_tokens //= 2
    trial_s = start_s + max_tokens * step_s
    num_trials = max(1, min(MAX_TRIALS, int(seconds / trial_s) - 1))
    return TrialPlan(num_trials, max_tokens, trial_s)


def run_turns(
    plain: TimedEngine,
    engine: TimedEngine,
    prompts: Sequence[list[int]],
    lengths: Mapping[int, Sequence[Length]],
    max_tokens: int,
    advance: Callable[[int], Any] = lambda _: None,
) -> dict[tuple[int, Length], float]:
    """Have both engines decode the same prompts in turns, by batch size and number of drafts.

    Returns how many times plain vLLM's tokens a second an engine has, the median over turns. Where
    it chooses the number of drafts itself, None, a whole round before the first lets it learn.
    """
    speedups: dict[tuple[int, Length], float] = {}
    for batch_size, choices in lengths.items():
        batches = [
            [prompts[(turn * batch_size + row) % len(prompts)] for row in range(batch_size)]
            for turn in range(NUM_TURNS)
        ]
        plain.decode(batches[-1], _NUM_WARM_UP_TOKENS)
        for k in choices:
            engine.decode(batches[-1], max_tokens if k is None else _NUM_WARM_UP_TOKENS, k)
        ratios: dict[Length, list[float]] = {k: [] for k in choices}
        for batch in batches:
            plain_rate = plain.decode(batch, max_tokens)
            for k in choices:
                ratios[k].append(engine.decode(batch, max_tokens, k) / plain_rate)
            advance(1)
        for k, turns in ratios.items():
            speedups[batch_size, k] = statistics.median(turns)
    return speedups
