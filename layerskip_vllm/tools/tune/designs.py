"""What `layerskip-vllm tune` weighs: ways to draft, their speed by load, and what to try for real.

Plain Python. K has no part in a design, since one engine can draft any number of tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip_vllm.config.flags import AUTO
from layerskip_vllm.tools.tune.drafts import DraftRecord
from layerskip_vllm.tools.tune.step_costs import Load, StepCosts

# K must be worth so much more where it follows the load, which is harder to read and to check.
GAIN_OF_LENGTHS = 1.01
# Of designs that differ in E alone so many are tried.
_MAX_TRIED_OF_A_KIND = 2


@dataclass(frozen=True)
class DraftTokens:
    """The tokens that drafts choose among."""

    number: int = 0  # of the draft vocabularies in a `DraftRecord`; 0 is all tokens
    share: float = 1.0  # of all tokens
    file: str | None = None


ALL_TOKENS = DraftTokens()


@dataclass(frozen=True)
class Design:
    """A way to draft, for any K."""

    exit_layer: int
    tokens: DraftTokens = ALL_TOKENS
    looks_up: bool = False
    reuses: bool = False

    @property
    def kind(self) -> tuple[DraftTokens, bool, bool]:
        """All but the exit layer."""
        return self.tokens, self.looks_up, self.reuses

    def describe(self) -> str:
        """Name it in a few words, such as "E = 6, lookup"."""
        words = [f"E = {self.exit_layer}"]
        if self.tokens != ALL_TOKENS:
            words.append(f"{100 * self.tokens.share:.3g} % of the tokens")
        words += ["lookup"] * self.looks_up + ["reuse"] * self.reuses
        return ", ".join(words)


@dataclass(frozen=True)
class Speedups:
    """How a design fares, in times plain vLLM, predicted or measured."""

    design: Design
    by_load: Mapping[Load, float]

    @property
    def batch_sizes(self) -> list[int]:
        """Those that there are speeds for."""
        return sorted({batch_size for batch_size, _ in self.by_load})

    @property
    def lengths(self) -> dict[int, int]:
        """The best K by batch size, of equal ones the smallest."""
        best: dict[int, int] = {}
        for (batch_size, k), speedup in sorted(self.by_load.items()):
            if batch_size not in best or speedup > self.by_load[batch_size, best[batch_size]]:
                best[batch_size] = k
        return best

    @property
    def length(self) -> int:
        """The best K of those that draft in every batch size, of equal ones the smallest."""
        num_known = Counter(k for _, k in self.by_load if k > 0)
        everywhere = [k for k in sorted(num_known) if num_known[k] == len(self.batch_sizes)]
        return max(everywhere, key=self.score_of)

    @property
    def score(self) -> float:
        """The mean over batch sizes with the best K of each."""
        return geometric_mean(self.by_load[load] for load in self.lengths.items())

    def score_of(self, length: int) -> float:
        """Return the mean over batch sizes with one K."""
        return geometric_mean(self.by_load[b, length] for b in self.batch_sizes)

    @property
    def follows_load(self) -> bool:
        """Whether one K for all batch sizes is worth less than the best of each."""
        return self.score > GAIN_OF_LENGTHS * self.score_of(self.length)


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the mean of ratios: twice and half as fast are as fast."""
    values = list(ratios)
    return math.exp(sum(map(math.log, values)) / len(values))


def list_designs(
    num_layers: int,
    vocabs: Sequence[DraftTokens],
    lookups: Sequence[bool],
    reuses: Sequence[bool],
) -> list[Design]:
    """List all that may be weighed: copied drafts leave no exit states to reuse."""
    return [
        Design(exit_layer, tokens, looks_up, reuse)
        for exit_layer in range(1, num_layers)
        for tokens in vocabs
        for looks_up in lookups
        for reuse in reuses
        if not (looks_up and reuse)
    ]


def predict_speedups(
    design: Design, record: DraftRecord, costs: StepCosts, least_reused: int
) -> Speedups:
    """Predict how a design fares under every load that was timed.

    Exit states are reused in steps of at least so many drafts.
    """
    by_load = {}
    for batch_size, k in costs.loads:
        played = record.play(design.exit_layer, k, design.tokens.number, design.looks_up)
        seconds = costs.predict(
            (batch_size, k),
            design.exit_layer,
            vocab_share=design.tokens.share,
            copy_share=played.copy_share,
            reuses=design.reuses and batch_size * k >= least_reused,
        )
        by_load[batch_size, k] = played.num_tokens * costs.plain[batch_size] / seconds
    return Speedups(design, by_load)


def choose_trials(predictions: Sequence[Speedups], num_trials: int) -> list[Speedups]:
    """Choose what to try for real: the best by prediction, of each kind no more than two."""
    chosen: list[Speedups] = []
    kinds: Counter[Any] = Counter()
    for prediction in sorted(predictions, key=lambda each: -each.score):
        if len(chosen) < num_trials and kinds[prediction.design.kind] < _MAX_TRIED_OF_A_KIND:
            kinds[prediction.design.kind] += 1
            chosen.append(prediction)
    return chosen


def choose_lengths(prediction: Speedups, longest: int) -> dict[int, list[int]]:
    """Choose which K to try by batch size: the best one for all and its neighbours, and its own."""
    best = prediction.length
    around = {k for k in (best - 1, best, best + 1) if 1 <= k <= longest}
    return {b: sorted(around | {k}) for b, k in prediction.lengths.items()}


def make_schedule(lengths: Mapping[int, int]) -> list[list[int]]:
    """Spread the K of some batch sizes over all: `[[first, last, K], ...]`, as vLLM takes them.

    Between two that were measured the border is their geometric mean. Beyond the last its K goes
    on.
    """
    sizes = sorted(lengths)
    rows: list[list[int]] = []
    first = 1
    for size, following in zip(sizes, [*sizes[1:], None], strict=True):
        last = math.isqrt(size * (following or size))
        if rows and rows[-1][2] == lengths[size]:
            rows[-1][1] = last
        else:
            rows.append([first, last, lengths[size]])
        first = last + 1
    return rows


def make_settings(
    design: Design, lengths: Mapping[int, int], is_auto: bool = False
) -> dict[str, Any]:
    """Make what vLLM's `speculative_config` takes, with K by batch size or "auto"."""
    largest = max(1, *lengths.values())
    settings: dict[str, Any] = {
        "method": "layerskip",
        "exit_layer": design.exit_layer,
        "num_speculative_tokens": f"{AUTO}:{largest}" if is_auto else largest,
    }
    if not is_auto and len(set(lengths.values())) > 1:
        settings["num_speculative_tokens_per_batch_size"] = make_schedule(lengths)
    if design.tokens.file is not None:
        settings["draft_vocab"] = design.tokens.file
    if design.looks_up:
        settings["lookup"] = "auto"
    if design.reuses:
        settings["reuse_exit_states"] = "auto"
    return settings
