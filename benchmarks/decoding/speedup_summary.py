"""What the rounds of `benchmarks.decoding.speedup` add up to, and which thresholds they miss."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.decoding.engines import Measurement, StepTimes
from benchmarks.decoding.weight_counts import WeightCounts
from layerskip_vllm.tools.speedup_bound import bound_speedup
from layerskip_vllm.tools.tokens import first_difference

MIN_SHARE_OF_BOUND = 0.85
MIN_SPEEDUP = 1.5


@dataclass(frozen=True)
class Load:
    """What is asked of the systems in a round.

    Attributes:
        batch_size: Requests decoded at once.
        num_prompt_tokens: Of each.
    """

    batch_size: int
    num_prompt_tokens: int


@dataclass(frozen=True)
class Summary:
    """One line of the table: a system under a load, over all rounds.

    Attributes:
        load: Requests decoded at once, and their prompts.
        system: What decoded.
        tokens_per_s: Median over the rounds.
        slowest: Tokens a second of the slowest round.
        fastest: And of the fastest.
        speedup: Median of the ratios to plain's round of the same turn.
        acceptance: Accepted by drafted tokens.
        accepted: Tokens of a draft that were accepted, on average.
        drafted: Tokens of a draft, on average.
        bound: What the weights read allow, in times plain (for drafts from the first E layers).
        share_of_bound: Speedup by bound.
        same_texts: Share of texts equal to plain's; None where no text is to be.
        same_tokens: Share of tokens before the first that is not plain's.
        prefill_s: Median time to the first token.
        accepted_by_position: Share of drafts accepted up to and including each position.
        tpot_s: Median time per output token of a request, the first not counted.
        tpot_p99_s: What 99 % of the requests are below.
        step_times: What a step takes, where it was timed by itself.
    """

    load: Load
    system: str
    tokens_per_s: float
    slowest: float
    fastest: float
    speedup: float | None
    acceptance: float | None
    accepted: float | None
    drafted: float | None
    bound: float | None
    share_of_bound: float | None
    same_texts: float | None
    same_tokens: float | None
    prefill_s: float
    accepted_by_position: tuple[float, ...] = ()
    tpot_s: float | None = None
    tpot_p99_s: float | None = None
    step_times: StepTimes | None = None


def summarize(
    results: Mapping[Load, Mapping[str, Sequence[Measurement]]],
    counts: WeightCounts,
    options: argparse.Namespace,
) -> list[Summary]:
    """Return the table's lines: medians, and ratios of rounds of the same turn."""
    return [
        _summarize_system(load, system, rounds, by_system.get("plain"), counts, options)
        for load, by_system in results.items()
        for system, rounds in by_system.items()
    ]


def _summarize_system(
    load: Load,
    system: str,
    rounds: Sequence[Measurement],
    plain: Sequence[Measurement] | None,
    counts: WeightCounts,
    options: argparse.Namespace,
) -> Summary:
    rates = [each.tokens_per_s for each in rounds]
    speedup = bound = acceptance = accepted = drafted = None
    if plain:
        ratios = [ours / theirs.tokens_per_s for ours, theirs in zip(rates, plain, strict=True)]
        speedup = statistics.median(ratios)
    if num_drafts := sum(each.counters.num_drafts for each in rounds):
        num_accepted = sum(each.counters.num_accepted_tokens for each in rounds)
        num_draft_tokens = sum(each.counters.num_draft_tokens for each in rounds)
        acceptance = num_accepted / num_draft_tokens
        accepted, drafted = num_accepted / num_drafts, num_draft_tokens / num_drafts
        if system in ("layerskip", "draft_model"):
            draft_share = counts.shares(options.exit_layer).total
            bound = bound_speedup(draft_share, options.num_speculative_tokens, accepted)
    by_position = tuple(
        sum(accepted) / max(1, num_drafts)
        for accepted in itertools.zip_longest(
            *(each.counters.num_accepted_tokens_per_pos for each in rounds), fillvalue=0
        )
    )
    tpots = sorted(tpot for each in rounds for tpot in each.tpot_s)
    same_texts = same_tokens = None
    if plain and not options.is_acceptance_given:
        same_texts, same_tokens = compare_texts(rounds, plain)
    return Summary(
        load=load,
        system=system,
        tokens_per_s=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        speedup=speedup,
        acceptance=acceptance,
        accepted=accepted,
        drafted=drafted,
        bound=bound,
        share_of_bound=speedup / bound if speedup and bound else None,
        same_texts=same_texts,
        same_tokens=same_tokens,
        prefill_s=statistics.median(each.prefill_s for each in rounds),
        accepted_by_position=by_position if num_drafts else (),
        tpot_s=statistics.median(tpots) if tpots else None,
        tpot_p99_s=tpots[math.ceil(0.99 * len(tpots)) - 1] if tpots else None,
    )


def compare_texts(
    rounds: Sequence[Measurement], plain: Sequence[Measurement]
) -> tuple[float, float]:
    """Return the share of texts equal to plain's, and of tokens before the first difference."""
    num_texts = num_equal = num_tokens = num_same = 0
    for ours, theirs in zip(rounds, plain, strict=True):
        for text, reference in zip(ours.tokens, theirs.tokens, strict=True):
            first = first_difference(text, reference)
            num_texts, num_equal = num_texts + 1, num_equal + (first == len(reference))
            num_tokens, num_same = num_tokens + len(reference), num_same + first
    return num_equal / num_texts, num_same / num_tokens


def find_missed_thresholds(summaries: Sequence[Summary]) -> list[str]:
    """Return in words what layerskip misses at batch 1; nothing if it meets every threshold.

    Args:
        summaries: All lines of the table.

    Returns:
        A sentence a threshold.

    Raises:
        ValueError: If a system that the thresholds speak of was not measured at batch 1.
    """
    shortest = min(line.load.num_prompt_tokens for line in summaries)
    measured = {line.system: line for line in summaries if line.load == Load(1, shortest)}
    if missing := {"plain", "layerskip", "draft_model"} - measured.keys():
        raise ValueError(
            f"--check compares plain, layerskip and draft_model at batch 1, but "
            f"{', '.join(sorted(missing))} was not measured there; leave --systems and "
            "--batch-sizes at their defaults."
        )
    ours, draft_model = measured["layerskip"], measured["draft_model"]
    missed = []
    if (ours.share_of_bound or 0.0) < MIN_SHARE_OF_BOUND:
        missed.append(
            f"{ours.share_of_bound or 0.0:.2f} of the bound; threshold {MIN_SHARE_OF_BOUND}"
        )
    if (ours.speedup or 0.0) < MIN_SPEEDUP:
        missed.append(f"{ours.speedup or 0.0:.2f} times plain vLLM; threshold {MIN_SPEEDUP}")
    if ours.tokens_per_s <= draft_model.tokens_per_s:
        missed.append(
            f"{ours.tokens_per_s:.1f} tokens/s, not faster than draft_model with "
            f"{draft_model.tokens_per_s:.1f}"
        )
    return missed
