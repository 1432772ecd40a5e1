"""K "auto" against a simulated engine, whose best K is known."""

from __future__ import annotations

from collections import Counter
from math import inf

import pytest

from layerskip_vllm.drafting.acceptance import DraftResult, RequestAcceptance
from layerskip_vllm.drafting.step_times import StepTimeTable
from tests.unit.drafting.simulated_engine import SimulatedEngine, StepTime, best_rate

K = 8


def read_bytes(batch_size: int, num_drafts: int) -> float:
    """Reading weights is all that a step costs."""
    return 1 + 0.28 * num_drafts


def compute(batch_size: int, num_drafts: int) -> float:
    """From 128 tokens on each costs as much as the one before."""
    return max(1.0, batch_size * (1 + num_drafts) / 128) + 0.2 * num_drafts


def rows_in_fours(batch_size: int, num_drafts: int) -> float:
    """Two rows or three take longer than four."""
    return (1.0, 1.4, 1.4, 1.15)[min(num_drafts, 3)] + 0.2 * num_drafts


def emulate(batch_size: int, num_drafts: int) -> float:
    """Each row costs what the first does."""
    return 1.15 + 1.15 * num_drafts


def dispatch(batch_size: int, num_drafts: int) -> float:
    """A draft step costs less than its bytes, drafting itself something."""
    return 1 + (0.2 + 0.1 * num_drafts if num_drafts else 0)


TIMES = [read_bytes, compute, rows_in_fours, emulate, dispatch]


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("step_time", TIMES)
def test_length_comes_to_the_best_when_it_is_left_to_the_engine(
    step_time: StepTime, batch_size: int, rate: float
) -> None:
    """Nearly, while requests of 100 steps come and go, and soon."""
    engine = SimulatedEngine(step_time, K, noise=0.03)
    rates = [rate] * batch_size
    best = best_rate(step_time, rates, K)
    assert engine.run(200, rates) > 0.75 * best  # before anything is known
    found = [engine.run(100, rates, first_id=i * batch_size) for i in range(1, 16)]
    assert sum(found) / len(found) > 0.91 * best


@pytest.mark.parametrize("step_time", TIMES)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_useless_drafts_cost_less_than_a_hundredth_when_that_is_known(
    step_time: StepTime, batch_size: int
) -> None:
    engine = SimulatedEngine(step_time, K)
    rates = [0.0] * batch_size
    assert engine.run(200, rates) > 0.9 * batch_size / step_time(batch_size, 0)
    assert engine.run(3000, rates) > 0.99 * batch_size / step_time(batch_size, 0)
    assert max(engine.chosen[200:]) == 1


def test_longer_drafts_are_not_tried_when_each_costs_what_it_brings() -> None:
    """As on a CPU with many requests: two lengths are enough to know."""
    engine = SimulatedEngine(lambda _, num_drafts: 1 + 0.9 * num_drafts, K, noise=0.03)
    engine.run(100, [0.85] * 16)
    assert max(engine.chosen) == 3


def test_probes_bring_drafts_back_when_text_becomes_predictable() -> None:
    engine = SimulatedEngine(read_bytes, K)
    engine.run(1000, [0.0])
    assert Counter(engine.chosen)[0] > 950
    engine.run(300, [0.95])
    assert engine.run(100, [0.95]) > 0.9 * best_rate(read_bytes, [0.95], K)


def test_probes_find_that_drafts_no_longer_pay_when_steps_become_slow() -> None:
    """As when another program comes to share the machine, or contexts grow."""
    engine = SimulatedEngine(read_bytes, K)
    engine.run(300, [0.75])
    assert sum(engine.chosen[-100:]) > 150
    engine.step_time = emulate
    engine.run(300, [0.75])
    assert engine.run(200, [0.75]) > 0.95 * best_rate(emulate, [0.75], K)


def test_length_stays_right_when_single_steps_are_slow() -> None:
    """One in ten takes up to thirty times as long: a garbage collection, a neighbour."""
    engine = SimulatedEngine(read_bytes, K)

    def disturbed(batch_size: int, num_drafts: int) -> float:
        slow = 30 * engine.random.random() if engine.random.random() < 0.1 else 1.0
        return read_bytes(batch_size, num_drafts) * slow

    engine.step_time = disturbed
    engine.run(300, [0.75] * 4)
    chosen = Counter(engine.chosen[-200:])
    assert chosen[2] + chosen[3] + chosen[1] > 150


def test_times_are_not_taken_when_the_engine_was_idle() -> None:
    engine = SimulatedEngine(read_bytes, K)
    for first_id in range(200):  # each a step of another request, after a pause
        engine.run(1, [0.75], first_id=first_id)
        engine.now += 100.0
    assert not engine.lengths._times.is_known(1, 0)


@pytest.mark.parametrize("step_time", TIMES)
@pytest.mark.parametrize("rate", [0.05, 0.85])
def test_length_comes_to_the_best_when_prompts_are_in_every_step(
    step_time: StepTime, rate: float
) -> None:
    """As in a large batch, of which some request ends at nearly every step."""
    engine = SimulatedEngine(step_time, K, noise=0.1)
    rates = [rate] * 16
    engine.run(300, rates, num_prompts=1)
    found = engine.run(400, rates, num_prompts=1)
    assert found > 0.93 * best_rate(step_time, rates, K)


def test_request_drafts_no_more_than_it_asks_for_when_others_do() -> None:
    engine = SimulatedEngine(read_bytes, K)
    engine.run(300, [0.95, 0.95], limits=[1, 2])
    assert max(engine.chosen) == 2
    assert Counter(engine.chosen[100:]).most_common(1)[0][0] == 2
    engine.run(100, [0.95], limits=[0], first_id=7)
    assert set(engine.chosen[-100:]) == {0}


def test_acceptance_is_each_requests_own_when_texts_differ() -> None:
    acceptance = RequestAcceptance(2)
    for _ in range(40):
        acceptance.observe({"easy": DraftResult(2, 2), "hard": DraftResult(2, 0)})
    easy = acceptance.expected_tokens({"easy": 2})
    assert acceptance.expected_tokens({"easy": 1}) == [easy[0], easy[1], easy[1]]
    hard = acceptance.expected_tokens({"hard": 2})
    assert easy[2] > 2.8
    assert hard[2] < 1.2
    assert hard[2] < acceptance.expected_tokens({"new": 2})[2] < easy[2]
    both = acceptance.expected_tokens({"easy": 2, "hard": 2})
    assert both == pytest.approx([a + b for a, b in zip(easy, hard, strict=True)])
    acceptance.forget(["easy"])
    assert acceptance.expected_tokens({"easy": 2}) == acceptance.expected_tokens({"new": 2})


def test_times_are_the_nearest_batch_sizes_when_there_are_none_of_its_own() -> None:
    times = StepTimeTable(4, draft_share=0.25)
    assert times.relative(8) == [1, 1.25, inf, inf, inf]  # a step at a time
    for _ in range(3):
        times.observe(8, 0, 10.0)
        times.observe(8, 1, 16.0)
        times.observe(8, 3, 19.0)
    expected = [1, 1.6, 1.75, 1.9, 2.15]
    assert times.relative(8) == pytest.approx(expected)
    assert times.relative(10) == pytest.approx(expected)
    assert times.relative(128)[1] == 1.25  # too far away
    assert not times.is_known(10, 0)


def test_borrowed_time_is_scaled_when_both_batch_sizes_know_another() -> None:
    times = StepTimeTable(4, draft_share=0.25)
    for batch_size, by_length in ((16, {0: 10.0, 1: 15.0, 3: 30.0}), (32, {0: 10.0, 1: 20.0})):
        for num_drafts, seconds in by_length.items():
            times.observe(batch_size, num_drafts, seconds)
            times.observe(batch_size, num_drafts, seconds)
    # One draft adds twice as much at 32 as at 16, so three are thought to.
    assert times.relative(32)[:4] == pytest.approx([1, 2, 3.5, 1 + 2 * 2])
    assert times.relative(16)[3] == pytest.approx(3)


@pytest.mark.parametrize(("seconds", "expected"), [(1.46, 1), (1.505, 0)])
def test_drafts_are_made_when_they_promise_two_percent_more_than_none(
    seconds: float, expected: int
) -> None:
    """One draft, accepted half of the time."""
    engine = SimulatedEngine(lambda _, num_drafts: seconds if num_drafts else 1.0, 1)
    engine.lengths._acceptance.expected_tokens = lambda limits: [1.0, 1.51]  # type: ignore[method-assign]
    engine.run(100, [0.5])
    assert engine.lengths._num_drafts == expected


def test_time_is_forgotten_when_it_is_old() -> None:
    times = StepTimeTable(1, draft_share=0.25)
    for num_drafts, seconds in ((1, 9.0), (1, 9.0), *((0, 1.0),) * 900):
        times.observe(2, num_drafts, seconds)
    assert times.relative(2) == [1, 9.0]
    for _ in range(200):
        times.observe(2, 0, 1.0)
    assert times.relative(2) == [1, 1.25]
