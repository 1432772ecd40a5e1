"""What `exits` has found out, the (E, K) that it speaks for, and both as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip_vllm.checkpoint.entry import CONFIG_KEY
from layerskip_vllm.training.exit_evaluation import Acceptance


@dataclass(frozen=True)
class Draft:
    """Drafts of one length from one exit."""

    exit_layer: int  # E
    num_speculative_tokens: int  # K
    acceptance: Acceptance
    speedup: float  # the most that the bytes read allow, in times plain decoding


@dataclass(frozen=True)
class Exit:
    """One layer's exit."""

    exit_layer: int  # E
    loss: float  # held-out cross-entropy in nats per token
    agreement: float  # share of held-out places where it chooses the last layer's token
    draft_share: float  # bytes of layers [0, E) and the head, as a share of all layers and the head
    drafts: tuple[Draft, ...]  # by K, from 1 up; none for the last layer

    @property
    def perplexity(self) -> float:
        """The loss as perplexity."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def best(self) -> Draft | None:
        """The drafts that promise most, of equal ones the shortest; None for the last layer."""
        return max(self.drafts, key=lambda draft: draft.speedup, default=None)


@dataclass(frozen=True)
class ExitReport:
    """Every exit of a model."""

    model: str  # path or name
    setting: Mapping[str, Any]  # what it was measured with and on
    num_held_out_tokens: int  # places that losses and agreements are measured over
    num_completion_tokens: int  # that drafts are measured over
    head_share: float  # the head's part of what a whole step reads
    exits: tuple[Exit, ...]  # first layer to last

    @property
    def best(self) -> Draft:
        """The drafts that promise most; of equal ones those of the earliest exit."""
        drafts = [exit_.best for exit_ in self.exits if exit_.best is not None]
        return max(drafts, key=lambda draft: draft.speedup)

    @property
    def pays(self) -> bool:
        """Whether any drafts promise to be faster than none."""
        return self.best.speedup > 1

    @property
    def entry(self) -> dict[str, int] | None:
        """The `layerskip` entry to put into `config.json`; None if no exit pays."""
        return self._best_settings if self.pays else None

    @property
    def _best_settings(self) -> dict[str, int]:
        best = self.best
        return {
            "exit_layer": best.exit_layer,
            "num_speculative_tokens": best.num_speculative_tokens,
        }

    def describe(self) -> str:
        """Return the result in one sentence."""
        best, num = self.best, self.best.num_speculative_tokens
        gain = f"at best {best.speedup:.2f} times plain decoding"
        if not self.pays:
            return f"No exit pays: {gain}, after layer {best.exit_layer} of {len(self.exits)}"
        tokens = "1 token" if num == 1 else f"{num} tokens"
        return f"Exit after layer {best.exit_layer} of {len(self.exits)}, draft {tokens}: {gain}"

    def describe_run(self) -> str:
        """Return one line with what was measured."""
        setting, (first, *others) = self.setting, self.setting["data"]
        data = Path(first).name + (f" and {len(others)} more" if others else "")
        return (
            f"{Path(self.model).name} ({setting['dtype']}), {self.num_held_out_tokens:,} held-out "
            f"tokens of {data}; greedy completions of "
            f"{setting['num_prompts']} prompts, {self.num_completion_tokens:,} tokens"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object; a perplexity beyond all numbers is null."""
        report = dataclasses.asdict(self)
        for exit_, fields in zip(self.exits, report["exits"], strict=True):
            fields["perplexity"] = exit_.perplexity if math.isfinite(exit_.perplexity) else None
            for draft in fields["drafts"]:
                del draft["exit_layer"]
        best = {**self._best_settings, "speedup": self.best.speedup}
        return {**report, CONFIG_KEY: self.entry, "best": best}
