"""What rounds on a plain and on a layer-skip server add up to: medians, speed-up, same tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.serving.client import Round
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters
from layerskip_vllm.tools.tokens import first_difference


@dataclass(frozen=True)
class Speed:
    """One server's speed.

    Attributes:
        tokens_per_s: Generated tokens a second, all requests together; median over the rounds.
        ttft_ms: Milliseconds to the first token; median over the requests.
        tpot_ms: Milliseconds per output token after the first; median over the requests.
        tokens_per_s_by_round: What `tokens_per_s` is the median of.
    """

    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    tokens_per_s_by_round: tuple[float, ...]


@dataclass(frozen=True)
class Mismatch:
    """A completion that differs between the servers.

    Attributes:
        prompt_index: Which prompt, counted over all rounds.
        position: The first token that differs, counted from 0.
        plain_token_id: What the plain server has there; None where it ended.
        layerskip_token_id: What the layer-skip server has there; None where it ended.
    """

    prompt_index: int
    position: int
    plain_token_id: int | None
    layerskip_token_id: int | None


@dataclass(frozen=True)
class Comparison:
    """What both servers did with the same requests, so many at once.

    Attributes:
        concurrency: Requests open at once.
        plain: The plain server's speed.
        layerskip: The layer-skip server's speed.
        counters: What was drafted and accepted.
        num_completions: Completions of each server.
        num_tokens: Tokens that the plain server generated.
        mismatches: The completions that differ.
    """

    concurrency: int
    plain: Speed
    layerskip: Speed
    counters: SpecDecodeCounters
    num_completions: int
    num_tokens: int
    mismatches: tuple[Mismatch, ...]

    @property
    def load(self) -> str:
        """The number of requests in words."""
        return describe_load(self.concurrency)

    @property
    def speedup(self) -> float:
        """How many times the plain server's tokens a second the layer-skip server makes."""
        return self.layerskip.tokens_per_s / self.plain.tokens_per_s


def describe_load(concurrency: int) -> str:
    """Return a number of requests in words."""
    return "one request" if concurrency == 1 else f"{concurrency} requests"


def summarize_speed(rounds: Sequence[Round]) -> Speed:
    """Sum one server's rounds up.

    Args:
        rounds: At least one round; at least one completion of two tokens among them.

    Returns:
        The medians.

    Raises:
        ValueError: If no completion has two tokens, so that there is no time per output token.
    """
    completions = [completion for round_ in rounds for completion in round_.completions]
    tpots_s = [c.tpot_s for c in completions if c.tpot_s is not None]
    if not tpots_s:
        raise ValueError(
            "every completion ended at its first token, so there is no time per output token; "
            "use a larger --max-tokens or other prompts."
        )
    by_round = tuple(round_.tokens_per_s for round_ in rounds)
    return Speed(
        tokens_per_s=statistics.median(by_round),
        ttft_ms=1000 * statistics.median(c.ttft_s for c in completions),
        tpot_ms=1000 * statistics.median(tpots_s),
        tokens_per_s_by_round=by_round,
    )


def _find_mismatch(
    prompt_index: int, plain: tuple[int, ...], layerskip: tuple[int, ...]
) -> Mismatch | None:
    if plain == layerskip:
        return None
    position = first_difference(plain, layerskip)
    plain_token_id, layerskip_token_id = (
        token_ids[position] if position < len(token_ids) else None
        for token_ids in (plain, layerskip)
    )
    return Mismatch(prompt_index, position, plain_token_id, layerskip_token_id)


def compare_rounds(
    concurrency: int,
    plain_rounds: Sequence[Round],
    layerskip_rounds: Sequence[Round],
    counters: SpecDecodeCounters,
) -> Comparison:
    """Compare two servers that were sent the same prompts.

    Args:
        concurrency: Requests open at once.
        plain_rounds: The plain server's rounds.
        layerskip_rounds: The layer-skip server's, with the same prompts in the same order.
        counters: What the layer-skip server counted over its rounds.

    Returns:
        Speeds, speed-up, and where tokens differ.

    Raises:
        ValueError: If it drafted nothing, or no completion has two tokens.
    """
    if counters.num_drafts == 0:
        raise ValueError("the layerskip server drafted nothing: num_drafts is 0 after the rounds.")
    pairs = [
        (plain.token_ids, layerskip.token_ids)
        for plain_round, layerskip_round in zip(plain_rounds, layerskip_rounds, strict=True)
        for plain, layerskip in zip(
            plain_round.completions, layerskip_round.completions, strict=True
        )
    ]
    found = (_find_mismatch(index, *pair) for index, pair in enumerate(pairs))
    return Comparison(
        concurrency=concurrency,
        plain=summarize_speed(plain_rounds),
        layerskip=summarize_speed(layerskip_rounds),
        counters=counters,
        num_completions=len(pairs),
        num_tokens=sum(len(plain) for plain, _ in pairs),
        mismatches=tuple(mismatch for mismatch in found if mismatch is not None),
    )
