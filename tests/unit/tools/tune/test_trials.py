"""Turns, plans and choices of `layerskip-vllm tune`, with engines that only count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from layerskip_vllm.tools.tune.designs import Design, Speedups
from layerskip_vllm.tools.tune.engines import TimedEngine
from layerskip_vllm.tools.tune.trials import NUM_TURNS, Trial, TrialOutcome, plan_trials, run_turns

PROMPTS = [[1], [2], [3]]


class CountingEngine:
    """Has its tokens a second, by number of drafts, turn by turn; keeps what it was asked."""

    def __init__(self, rates: dict[int | None, list[float]]) -> None:
        self.rates = {k: iter(turns) for k, turns in rates.items()}
        self.asked: list[tuple[list[list[int]], int, int | None]] = []

    def decode(self, prompts: Any, max_tokens: int, num_drafts: int | None = None) -> float:
        self.asked.append((list(prompts), max_tokens, num_drafts))
        return next(self.rates[num_drafts]) if max_tokens == 64 else 0.0


def turn(
    plain: CountingEngine, engine: CountingEngine, lengths: dict[int, Sequence[int]], **given: Any
) -> dict[tuple[int, int], float]:
    return run_turns(
        cast(TimedEngine, plain), cast(TimedEngine, engine), PROMPTS, lengths, 64, **given
    )


def test_speedup_is_the_median_of_turns_when_the_machine_has_moods() -> None:
    plain = CountingEngine({None: [10.0, 5.0, 10.0]})
    engine = CountingEngine({1: [20.0, 9.0, 10.0], 2: [30.0, 15.0, 20.0]})
    done: list[int] = []
    speedups = turn(plain, engine, {2: [1, 2]}, advance=done.append)
    assert speedups == {(2, 1): 1.8, (2, 2): 3.0}
    assert len(done) == NUM_TURNS
    # Both have the same prompts in a turn, others in the next, after a round to warm up.
    rounds = [prompts for prompts, max_tokens, _ in plain.asked if max_tokens == 64]
    assert rounds == [[[1], [2]], [[3], [1]], [[2], [3]]]
    assert [p for p, m, k in engine.asked if m == 64 and k == 2] == rounds
    assert [(m, k) for _, m, k in engine.asked[:2]] == [(16, 1), (16, 2)]


def test_engine_learns_for_a_whole_round_when_it_chooses_k_itself() -> None:
    plain = CountingEngine({None: [10.0] * 3})
    engine = CountingEngine({None: [1.0, 12.0, 13.0, 14.0]})
    assert turn(plain, engine, cast(Any, {1: [None]})) == {(1, None): 1.3}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1000.0, (6, 128)),
        (200.0, (4, 128)),  # 20 rounds of 128 steps of 10 ms and a start: 35.6 s, and one for auto
        (120.0, (4, 64)),  # 22.8 s
        (60.0, (2, 32)),  # 16.4 s
        (1.0, (1, 32)),
        (-5.0, (1, 32)),
    ],
)
def test_rounds_get_shorter_before_trials_get_few(
    seconds: float, expected: tuple[int, int]
) -> None:
    plan = plan_trials({1: 0.004, 4: 0.006}, start_s=10.0, seconds=seconds)
    assert (plan.num_trials, plan.max_tokens) == expected


def make_trial(exit_layer: int, by_load: dict[tuple[int, int], float]) -> Trial:
    speedups = Speedups(Design(exit_layer), by_load)
    return Trial(speedups, speedups)


ONE_FOR_ALL = make_trial(2, {(1, 2): 1.5, (1, 3): 1.4, (4, 2): 1.2, (4, 3): 1.21})
BY_LOAD = make_trial(3, {(1, 2): 1.5, (1, 4): 2.0, (4, 2): 1.2, (4, 4): 0.9})


def test_trial_has_one_length_when_that_is_as_good_as_the_best_of_each_batch() -> None:
    assert ONE_FOR_ALL.lengths == {1: 2, 4: 2}
    assert ONE_FOR_ALL.speedups == {1: 1.5, 4: 1.2}
    assert BY_LOAD.lengths == {1: 4, 4: 2}


def test_outcome_is_the_fastest_trial() -> None:
    outcome = TrialOutcome([ONE_FOR_ALL, BY_LOAD], None)
    assert outcome.best is BY_LOAD
    assert outcome.speedups == {1: 2.0, 4: 1.2}
    assert not outcome.is_auto
    assert outcome.pays


def test_length_is_left_to_the_engine_when_that_is_about_as_fast() -> None:
    trials = [ONE_FOR_ALL, BY_LOAD]
    assert TrialOutcome(trials, {1: 1.99, 4: 1.19}).is_auto
    slow = TrialOutcome(trials, {1: 1.9, 4: 1.1})
    assert not slow.is_auto
    assert slow.speedups == BY_LOAD.speedups


def test_nothing_pays_when_the_mean_is_slower_than_plain() -> None:
    assert not TrialOutcome([make_trial(2, {(1, 1): 1.2, (4, 1): 0.8})], None).pays
