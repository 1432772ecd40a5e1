"""Costs, drafts and choices of `layerskip-vllm tune`, against numbers worked by hand."""

from __future__ import annotations

import pytest

from layerskip_vllm.tools.tune.designs import (
    Design,
    DraftTokens,
    Speedups,
    choose_lengths,
    choose_trials,
    list_designs,
    make_schedule,
    make_settings,
    predict_speedups,
)
from layerskip_vllm.tools.tune.drafts import (
    DraftRecord,
    PlayedDrafts,
    find_copied_lengths,
    play_all,
)
from layerskip_vllm.tools.tune.step_costs import StepCosts
from layerskip_vllm.tools.tune.tuning import choose_timed_exits

# Four layers and a head of two: 4 ms a step and 1 ms a layer at batch 1, twice that at batch 2.
PLAIN = {1: 4.0, 2: 8.0}


def true_seconds(exit_layer: int, batch_size: int, k: int) -> float:
    """A step: verification of k more tokens 0.5 each, draft steps of E layers and the head."""
    return batch_size * (4.0 + 0.5 * k + k * (exit_layer + 2) * 1.0)


def make_costs(*exit_layers: int) -> StepCosts:
    timed = {
        e: {(b, k): true_seconds(e, b, k) for b in PLAIN for k in range(3)} for e in exit_layers
    }
    return StepCosts.fit(4, 2.0, PLAIN, timed)


def make_record(*by_exit: list[int], copies: list[int] | None = None) -> DraftRecord:
    """One prompt; by exit, how many drafts are right from each place on."""
    runs = [[row] for row in by_exit]
    return DraftRecord(len(by_exit) + 1, 2.0, [runs, runs], [copies or [-1] * len(by_exit[0])])


def test_costs_are_the_engines_when_they_follow_the_model() -> None:
    costs = make_costs(1, 2)
    assert costs.layer == pytest.approx({1: 1.0, 2: 2.0})
    for exit_layer in (1, 2, 3):
        for load in costs.loads:
            expected = true_seconds(exit_layer, *load)
            assert costs.predict(load, exit_layer) == pytest.approx(expected)


def test_cost_is_less_when_the_head_is_smaller_or_drafts_are_copied() -> None:
    costs = make_costs(1, 2)
    whole = costs.predict((2, 2), 3)
    # The head is 2 layers of 2 ms, read twice; half of it saves 4 ms.
    assert costs.predict((2, 2), 3, vocab_share=0.5) == pytest.approx(whole - 4.0)
    # With half of the drafts copied both of two requests have a copy in a quarter of the steps.
    drafts = 2 * (3 + 2) * 2.0
    assert costs.predict((2, 2), 3, copy_share=0.5) == pytest.approx(whole - drafts / 4)


def test_cost_is_less_when_verification_begins_at_the_exit() -> None:
    costs = make_costs(1, 2)
    # Two more tokens of two requests take 2 ms, of which 3 layers are 3 of 6 with the head.
    saved = costs.predict((2, 2), 3) - costs.predict((2, 2), 3, reuses=True)
    assert saved == pytest.approx(2.0 * 3 / 6)


def test_costs_have_no_slope_when_one_exit_was_timed() -> None:
    costs = make_costs(1)
    assert costs.layer == {1: 0.0, 2: 0.0}
    assert costs.predict((2, 1), 1) == pytest.approx(true_seconds(1, 2, 1))


def test_rounds_are_played_when_worked_by_hand() -> None:
    # From place 1: 1 right (places 1, 2), then at 3 two right, then at 6 none fits.
    runs = [[5, 1, 0, 2, 1, 0, 1]]
    assert play_all(runs, None, 2) == PlayedDrafts(1 + 3 / 2, 0.0)
    # The first draft is a copy with both right, the next at 4 has one right of its own.
    copies = [[-1, 4, -1, -1, -1, -1, -1]]
    assert play_all(runs, copies, 2) == PlayedDrafts(1 + 3 / 2, 0.5)
    assert play_all(runs, copies, 0) == PlayedDrafts(1.0, 0.0)
    assert play_all([[1]], None, 1) == PlayedDrafts(1.0, 0.0)


def test_copies_are_found_where_five_tokens_stood_before() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 9, 9]
    completion = [1, 2, 3, 4, 5, 6, 8, 9]
    # After 1 2 3 4 5 a copy has 6 right, after 1 .. 6 none: 7 for 8.
    assert find_copied_lengths(prompt, completion, 2) == [-1, -1, -1, -1, -1, 1, 0, -1]
    assert find_copied_lengths(prompt, [1, 2, 3, 4, 5, 6, 7, 9], 3)[5:] == [3, 2, 1]


def test_speedup_is_tokens_by_time_when_worked_by_hand() -> None:
    record = make_record([9, 1, 0, 1, 0], [9, 9, 9, 9, 9], [9, 9, 9, 9, 9])
    costs = make_costs(1, 2)
    first = predict_speedups(Design(1), record, costs, least_reused=24)
    # K = 1 at batch 1: all drafts are right, 2 tokens in 4 + 0.5 + 3; plain takes 4 for one.
    assert first.by_load[1, 1] == pytest.approx(2 * 4 / 7.5)
    assert first.by_load[1, 0] == pytest.approx(1.0)
    # K = 2: at places 1 and 3 one of two is right.
    assert first.by_load[1, 2] == pytest.approx(2 * 4 / (4 + 1 + 6))
    assert first.by_load[2, 1] == pytest.approx(first.by_load[1, 1])


def test_exit_states_are_reused_where_there_are_enough_drafts() -> None:
    record = make_record([9] * 9, [9] * 9, [9] * 9)
    costs = make_costs(1, 2)
    plain = predict_speedups(Design(2), record, costs, least_reused=4)
    reused = predict_speedups(Design(2, reuses=True), record, costs, least_reused=4)
    faster = {load for load in costs.loads if reused.by_load[load] > plain.by_load[load] + 1e-9}
    assert faster == {(2, 2)}


def make_speedups(*rows: tuple[float, ...], exit_layer: int = 1, **design: bool) -> Speedups:
    """By batch size 1, 2, .., speeds by K from 0."""
    by_load = {(b, k): value for b, row in enumerate(rows, 1) for k, value in enumerate(row)}
    return Speedups(Design(exit_layer, **design), by_load)


def test_length_is_the_best_of_all_batches_when_one_is_for_all() -> None:
    speedups = make_speedups((1.0, 1.2, 1.5, 1.5), (1.0, 0.9, 0.7, 0.8))
    assert speedups.lengths == {1: 2, 2: 0}
    # 1.2 * 0.9 = 1.08, 1.5 * 0.7 = 1.05, 1.5 * 0.8 = 1.2.
    assert speedups.length == 3
    assert speedups.score == pytest.approx(1.5**0.5)
    assert speedups.follows_load
    assert choose_lengths(speedups, longest=3) == {1: [2, 3], 2: [0, 2, 3]}


def test_length_follows_no_load_when_that_is_worth_a_percent_at_most() -> None:
    assert not make_speedups((1.0, 1.5, 1.509), (1.0, 1.3, 1.29)).follows_load
    assert make_speedups((1.0, 1.5, 1.56), (1.0, 1.3, 1.2)).follows_load


def test_trials_are_the_best_but_two_of_a_kind() -> None:
    speeds = [1.5, 1.4, 1.3, 1.2, 1.1]
    alike = [make_speedups((1.0, s), exit_layer=e) for e, s in enumerate(speeds, 1)]
    other = make_speedups((1.0, 1.25), exit_layer=6, looks_up=True)
    chosen = choose_trials([other, *alike], num_trials=4)
    assert [each.design.exit_layer for each in chosen] == [1, 2, 6]
    assert [each.design.exit_layer for each in choose_trials(alike, 1)] == [1]


def test_designs_have_no_lookup_and_reuse_together() -> None:
    designs = list_designs(3, [DraftTokens()], [False, True], [False, True])
    assert len(designs) == 2 * 3
    assert not any(design.looks_up and design.reuses for design in designs)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({1: 4, 4: 4, 16: 2}, [[1, 8, 4], [9, 16, 2]]),
        ({1: 4, 4: 2, 16: 0}, [[1, 2, 4], [3, 8, 2], [9, 16, 0]]),
        ({3: 2, 4: 1}, [[1, 3, 2], [4, 4, 1]]),
        ({8: 3}, [[1, 8, 3]]),
    ],
)
def test_schedule_has_its_borders_between_the_batch_sizes(
    lengths: dict[int, int], expected: list[list[int]]
) -> None:
    assert make_schedule(lengths) == expected


def test_settings_are_what_vllm_takes() -> None:
    tokens = DraftTokens(1, 0.25, "some.json")
    assert make_settings(Design(6), {1: 4, 4: 4}) == {
        "method": "layerskip",
        "exit_layer": 6,
        "num_speculative_tokens": 4,
    }
    assert make_settings(Design(6, tokens, looks_up=True), {1: 4, 4: 0}) == {
        "method": "layerskip",
        "exit_layer": 6,
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 2, 4], [3, 4, 0]],
        "draft_vocab": "some.json",
        "lookup": "auto",
    }
    assert make_settings(Design(6, reuses=True), {1: 4, 4: 2}, is_auto=True) == {
        "method": "layerskip",
        "exit_layer": 6,
        "num_speculative_tokens": "auto:4",
        "reuse_exit_states": "auto",
    }


def test_timed_exits_are_the_best_by_bytes_and_one_far_from_it() -> None:
    bad, good = [9] + [0] * 30, [9] * 31
    assert choose_timed_exits(make_record(bad, good, good, good, good)) == [2, 4]
    assert choose_timed_exits(make_record(bad, bad, bad, good)) == [2, 4]
    assert choose_timed_exits(make_record(good)) == [1]
