"""Where a copy is taken from, how long it is, and when there is none; the same on both runners."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from layerskip_vllm.drafting.lookup import MAX_MATCH, MIN_MATCH, find_copies, find_copy

PHRASE = list(range(20, 20 + MAX_MATCH))


def copy(text: list[int], num_tokens: int = 3) -> list[int] | None:
    found = find_copy(np.array(text, dtype=np.int32), num_tokens)
    return None if found is None else found.tolist()


def obvious_copy(text: list[int], num_tokens: int) -> list[int] | None:
    """Try all lengths and all places, the longest and the last first."""
    for length in range(MAX_MATCH, MIN_MATCH - 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                text = list(text)
                for _ in range(num_tokens):
                    text.append(text[start + length])
                    start += 1
                return text[-num_tokens:]
    return None


def test_copy_is_what_followed_when_the_last_tokens_stood_before() -> None:
    assert copy([1, *PHRASE, 2, 3, 4, 5, *PHRASE]) == [2, 3, 4]


@pytest.mark.parametrize("length", range(1, MAX_MATCH + 1))
def test_copy_is_taken_when_enough_tokens_agree(length: int) -> None:
    text = [1, *PHRASE[-length:], 2, 3, 4, 5, *PHRASE[-length:]]
    assert (copy(text) is not None) == (length >= MIN_MATCH)


def test_longest_match_counts_when_there_are_several() -> None:
    shorter = PHRASE[-MIN_MATCH:]
    assert copy([1, *PHRASE, 2, 2, 2, 3, *shorter, 4, 4, 4, 5, *PHRASE]) == [2, 2, 2]


def test_last_match_counts_when_several_are_as_long() -> None:
    assert copy([1, *PHRASE, 2, 2, 2, *PHRASE, 3, 3, 3, 4, *PHRASE]) == [3, 3, 3]


def test_copy_goes_on_with_itself_when_it_reaches_the_end() -> None:
    assert copy([9] * (MIN_MATCH + 1), 6) == [9] * 6
    assert copy([7, 8, 9] * 4, 5) == [7, 8, 9, 7, 8]


@pytest.mark.parametrize("length", range(1, 9))
def test_there_is_no_copy_when_the_text_is_short(length: int) -> None:
    assert (copy([9] * length) is not None) == (length > MIN_MATCH)


def test_copy_is_the_obvious_one_when_text_is_any() -> None:
    source = random.Random(0)
    num_found = 0
    for _ in range(500):
        text = [source.randrange(2) for _ in range(source.randrange(1, 40))]
        found = copy(text, 4)
        assert found == obvious_copy(text, 4)
        num_found += found is not None
    assert 100 < num_found < 450


def make_batch(rows: list[list[int]], num_embedded: int = 0) -> Any:
    """Rows of a table that has another request's tokens after their ends."""
    length = max(map(len, rows)) + 10
    table = np.array([(row + PHRASE * length)[:length] for row in rows], dtype=np.int32)
    is_token = np.ones_like(table, dtype=bool)
    is_token[:, :num_embedded] = False
    return SimpleNamespace(
        token_ids_cpu=table,
        is_token_ids=is_token,
        num_tokens_no_spec=np.array([len(row) for row in rows], dtype=np.int32),
    )


def test_rows_have_copies_when_their_own_text_and_new_tokens_repeat() -> None:
    text = [1, *PHRASE, 2, 3, 4, 5, *PHRASE[:-1]]
    batch = make_batch([text, text, [1, 2, 3], text])
    sampled = torch.tensor([[PHRASE[-1], -1], [6, -1], [PHRASE[-1], -1], [PHRASE[-1], 2]])
    num_sampled = torch.tensor([1, 1, 1, 2], dtype=torch.int32)
    copies = find_copies(batch, sampled, num_sampled, 3)
    assert copies.tolist() == [[2, 3, 4], [-1] * 3, [-1] * 3, [3, 4, 5]]
    assert copies.dtype == torch.int64


def test_row_has_no_copy_when_it_is_in_the_middle_of_its_prompt() -> None:
    batch = make_batch([[7] * 20])
    copies = find_copies(batch, torch.tensor([[7]]), torch.tensor([0], dtype=torch.int32), 2)
    assert copies.tolist() == [[-1, -1]]


@pytest.mark.parametrize(("num_embedded", "has_copy"), [(1, True), (20, False)])
def test_embeddings_are_no_tokens_when_a_prompt_has_them(num_embedded: int, has_copy: bool) -> None:
    """What stands in their places are the tokens of a request that was there before."""
    text = [1, *PHRASE, *range(50, 71), *PHRASE[:-1]]
    batch = make_batch([text], num_embedded)
    sampled = torch.tensor([[PHRASE[-1]]])
    copies = find_copies(batch, sampled, torch.tensor([1], dtype=torch.int32), 2)
    assert bool((copies >= 0).all()) == has_copy
