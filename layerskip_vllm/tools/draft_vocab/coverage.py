"""Tokens by how often they come, and what share of other text the first of them are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

HELD_OUT_ONE_IN = 10
BLOCK_TOKENS = 128


@dataclass(frozen=True)
class TokenCounts:
    """How often each token comes in a kind of text, in two parts of it."""

    counted: Counter[int]  # by which tokens are ranked
    held_out: Counter[int]  # by which their ranks are judged


def count_tokens(token_ids: Sequence[int]) -> TokenCounts:
    """Count a text's tokens; one block of ten, of 128 tokens each, is held out.

    `ValueError` if the text is too short for that.
    """
    blocks = [token_ids[i : i + BLOCK_TOKENS] for i in range(0, len(token_ids), BLOCK_TOKENS)]
    if len(blocks) < HELD_OUT_ONE_IN:
        least = (HELD_OUT_ONE_IN - 1) * BLOCK_TOKENS + 1
        raise ValueError(
            f"data has {len(token_ids)} tokens of a kind; it must have at least {least} of each, "
            "to count some and hold out others."
        )
    counts = TokenCounts(Counter(), Counter())
    for number, block in enumerate(blocks, start=1):
        part = counts.counted if number % HELD_OUT_ONE_IN else counts.held_out
        part.update(block)
    return counts


def rank_tokens(counted: Counter[int], vocab_size: int) -> list[int]:
    """Order a vocabulary by how often its tokens come.

    Tokens that never come follow by their ids: those of a BPE tokenizer are in the order in which
    its training found them, the most frequent first.
    """
    return sorted(range(vocab_size), key=lambda token_id: (-counted[token_id], token_id))


def find_coverage(token_ids: Sequence[int], counts: Counter[int]) -> float:
    """Return which share of the counted text is of these tokens, 0 to 1."""
    return sum(counts[token_id] for token_id in token_ids) / counts.total()


def parse_size(size: str, vocab_size: int) -> int:
    """Read how many tokens are wanted, "16000" or "12.5%" of the vocabulary.

    `ValueError` if it is neither, or the vocabulary has not so many.
    """
    try:
        wanted = float(size.removesuffix("%")) / 100 if size.endswith("%") else int(size)
        num_tokens = round(wanted * vocab_size) if size.endswith("%") else int(wanted)
    except (ValueError, OverflowError):  # no number; infinite or none
        num_tokens = 0
    if not 1 <= num_tokens <= vocab_size:
        raise ValueError(
            f"size is {size!r}; it must be a number of tokens from 1 to {vocab_size}, or a share "
            "of them such as 12.5%."
        )
    return num_tokens
