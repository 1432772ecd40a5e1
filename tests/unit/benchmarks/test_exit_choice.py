"""Rounds of drafting played by hand over where two exits agree with the model."""

from __future__ import annotations

import pytest

from benchmarks.decoding.exit_choice import MAX_K, DraftPlan, Game

SHARES = [0.0, 0.25, 0.5, 1.0]
SHALLOW, DEEP = DraftPlan(1, 1), DraftPlan(2, 1)


def make_game(*prompts: tuple[str, str]) -> Game:
    """A game of prompts; a letter for each token, "x" where the exit agrees."""
    rows = [[[c == "x" for c in "." + exit_ + "." * MAX_K] for exit_ in exits] for exits in prompts]
    return Game(rows, SHARES)


def test_round_yields_its_accepted_drafts_and_one_when_played() -> None:
    game = make_game(("x..x", "xxxx"))
    # Accepted at the first place alone, then one token a round: 2 + 1 + 2 tokens, three rounds.
    assert game.speed(lambda *_: SHALLOW) == pytest.approx(5 / (3 * 1.25))
    assert game.speed(lambda *_: DEEP) == pytest.approx(4 / (2 * 1.5))
    assert game.best_fixed([SHALLOW, DEEP])[1] == SHALLOW


def test_oracle_takes_the_cheaper_exit_when_both_are_right() -> None:
    game = make_game(("x...", "xxx."))
    assert game.oracle_speed([SHALLOW, DEEP]) == pytest.approx(4 / (1.25 + 1.5))


@pytest.mark.parametrize("sees_all", [False, True])
def test_history_finds_the_exit_of_each_request_when_they_differ(sees_all: bool) -> None:
    game = make_game(("." * 400, "x" * 400), ("x" * 400, "x" * 400))
    fixed = game.best_fixed([SHALLOW, DEEP])[0]
    found = game.history_speed([SHALLOW, DEEP], 0.9, sees_all, game.agreement())
    assert fixed < 0.97 * found
    assert found < game.oracle_speed([SHALLOW, DEEP])
