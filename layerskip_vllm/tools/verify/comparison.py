"""What an engine's outputs differ in from plain vLLM's, and what that means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from layerskip_vllm.tools.tokens import first_difference
from layerskip_vllm.tools.verify.engine_run import EngineOutput, ScoredCompletion
from layerskip_vllm.tools.verify.runs import DRAFTED, FLOOR, PLAIN, UNVERIFIED
from layerskip_vllm.tools.verify.statistics import compare_samples

# The probability that one comparison calls two samples of one distribution different. A report
# makes two that must not: the floor's and the drafts'.
FALSE_ALARM = 1e-6

# The least tolerance, in nats: kernels add up in other orders in batches of other shapes.
_MIN_TOLERANCE = 1e-4
# A logit of this size is rounded by a step of as many epsilons.
_LARGE_LOGIT = 16


@dataclass(frozen=True)
class Divergence:
    """Where a greedy completion first differs from plain vLLM's.

    The gap is how much less likely plain vLLM finds the other token than its own; where that is not
    among the likeliest, the least that it can be.
    """

    prompt: int  # its index
    position: int  # the token's
    gap: float  # nats


@dataclass(frozen=True)
class EngineComparison:
    """An engine against plain vLLM; alike samples have neither p-value nor distance."""

    divergences: tuple[Divergence, ...]  # of the greedy completions
    noise: float  # the largest difference of a token's log probabilities before one
    p_value: float | None  # corrected for all prompts and positions
    distance: float | None  # the largest total variation distance at one position
    acceptance: float | None  # share of drafts accepted in the greedy completions

    def lost(self, tolerance: float) -> list[Divergence]:
        """Return the divergences that are no ties."""
        return [divergence for divergence in self.divergences if divergence.gap > tolerance]


@dataclass(frozen=True)
class Verdict:
    """What the comparisons say."""

    comparisons: Mapping[str, EngineComparison]  # by the name of the run
    tolerance: float  # the largest gap that counts as a tie, in nats
    problems: tuple[str, ...]  # what keeps drafts from being lossless, or the check from seeing it


def conclude(results: Mapping[str, EngineOutput]) -> Verdict:
    """Compare all runs, by the names in `runs.RUNS`, with the plain one: what does that mean?"""
    plain, floor = results[PLAIN], results[FLOOR]
    comparisons = {FLOOR: compare_results(plain, floor, [plain])}
    for name in (DRAFTED, UNVERIFIED):
        comparisons[name] = compare_results(plain, results[name], [plain, floor])
    tolerance = find_tolerance(plain.dtype, comparisons[FLOOR])
    return Verdict(comparisons, tolerance, tuple(_find_problems(comparisons, tolerance)))


def compare_results(
    plain: EngineOutput, other: EngineOutput, plain_samples: Sequence[EngineOutput]
) -> EngineComparison:
    """Compare an engine with plain vLLM: greedy completions, and samples with all of plain's."""
    divergences, noise = [], 0.0
    for prompt, (expected, found) in enumerate(zip(plain.greedy, other.greedy, strict=True)):
        end = first_difference(expected.token_ids, found.token_ids)
        for index in range(end):
            token_id = expected.token_ids[index]
            here, there = expected.logprobs[index], found.logprobs[index]
            noise = max(noise, abs(here[token_id] - there[token_id]))
        if end < len(expected.token_ids):
            divergences.append(Divergence(prompt, end, _find_gap(expected, found, end)))
    p_value, distance = _compare_samples(other, plain_samples)
    return EngineComparison(tuple(divergences), noise, p_value, distance, other.acceptance)


def find_tolerance(dtype: str, floor: EngineComparison) -> float:
    """Find the largest gap between two tokens, in nats, that rounding alone can turn around.

    That is the gaps that the floor, plain vLLM against itself in batches of other shapes, has
    turned around, twice its noise (one token may go up and the other down), or what the dtype's own
    rounding makes, whichever is most.
    """
    rounding = torch.finfo(getattr(torch, dtype)).eps * _LARGE_LOGIT
    gaps = [divergence.gap for divergence in floor.divergences]
    return max(_MIN_TOLERANCE, rounding, 2 * floor.noise, *gaps)


def _find_gap(expected: ScoredCompletion, found: ScoredCompletion, index: int) -> float:
    logprobs = expected.logprobs[index]
    least = min(logprobs.values())
    own = logprobs[expected.token_ids[index]]
    return own - logprobs.get(found.token_ids[index], least)


def _compare_samples(
    other: EngineOutput, plain_samples: Sequence[EngineOutput]
) -> tuple[float | None, float | None]:
    """Return the p-value, corrected for the number of prompts (Bonferroni), and the distance."""
    comparisons = []
    for prompt, sample in enumerate(other.samples):
        expected = [tokens for plain in plain_samples for tokens in plain.samples[prompt]]
        try:
            comparisons.append(compare_samples(sample, expected))
        except ValueError:  # all alike: nothing to tell apart
            continue
    if not comparisons:
        return None, None
    p_value = len(comparisons) * min(comparison.p_value for comparison in comparisons)
    return min(1.0, p_value), max(comparison.distance for comparison in comparisons)


def _find_problems(comparisons: Mapping[str, EngineComparison], tolerance: float) -> list[str]:
    floor, drafted = comparisons[FLOOR], comparisons[DRAFTED]
    unverified = comparisons[UNVERIFIED]
    problems = []
    if _differs(floor):
        problems.append(
            f"two runs of plain vLLM sample from different distributions (p = {floor.p_value:.1e})"
        )
    if drafted.acceptance is None:
        problems.append("nothing was drafted, so that nothing was verified")
    if lost := drafted.lost(tolerance):
        first = lost[0]
        problems.append(
            f"greedy tokens are lost: {len(lost)} prompts diverge from plain vLLM, the first "
            f"(prompt {first.prompt}, token {first.position}) by {first.gap:.2g} nats, where "
            f"rounding explains {tolerance:.2g}"
        )
    if _differs(drafted):
        problems.append(
            f"sampled tokens have another distribution than plain vLLM's (p = "
            f"{drafted.p_value:.1e})"
        )
    if not unverified.lost(tolerance):
        problems.append(
            "the check can't see a loss: greedy tokens are plain vLLM's even where nothing "
            "verifies the drafts; more prompts, more tokens or a smaller exit layer show one"
        )
    if not _differs(unverified):
        problems.append(
            "the check can't see a loss: samples are like plain vLLM's even where nothing "
            "verifies the drafts; more samples or a smaller exit layer show one"
        )
    return problems


def _differs(comparison: EngineComparison) -> bool:
    return comparison.p_value is not None and comparison.p_value < FALSE_ALARM
