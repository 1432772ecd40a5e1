"""Says what the demo found: a headline, a table for the terminal, and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.serving.comparison import Comparison, Speed
from layerskip_vllm.tools.server.metrics import LayerSkipInfo


@dataclass(frozen=True)
class RunSetting:
    """What was run, and on what.

    Attributes:
        model: The model's path or name.
        drafting: What the layer-skip server says it drafts with.
        dtype: The model's data type.
        num_prompts: Prompts a round.
        num_rounds: Rounds on each server.
        max_tokens: Most tokens a completion.
        hardware: The machine.
        versions: Versions of what was measured, by name.
        commands: Each server's command line without its port, by the server's name.
    """

    model: str
    drafting: LayerSkipInfo
    dtype: str
    num_prompts: int
    num_rounds: int
    max_tokens: int
    hardware: str
    versions: Mapping[str, str]
    commands: Mapping[str, str]

    def describe(self) -> str:
        """Return three lines: what was run, what was sent, and the machine."""
        drafting = self.drafting
        rounds = "1 round" if self.num_rounds == 1 else f"median of {self.num_rounds} rounds"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{Path(self.model).name} ({self.dtype}), drafts of {drafting.num_speculative_tokens} "
            f"from the first {drafting.exit_layer} of {drafting.num_layers} layers\n"
            f"{self.num_prompts} held-out prompts a round, up to {self.max_tokens} tokens each, "
            f"greedy; {rounds}\n"
            f"{self.hardware}; {versions}"
        )


def is_every_token_same(comparisons: Sequence[Comparison]) -> bool:
    """Return whether both servers generated the same tokens and equally many."""
    return not any(comparison.mismatches for comparison in comparisons)


def describe_equality(comparisons: Sequence[Comparison]) -> str:
    """Return whether every token was the same, with the numbers that say so."""
    if is_every_token_same(comparisons):
        return f"all {sum(comparison.num_tokens for comparison in comparisons):,} tokens the same"
    differing = next(comparison for comparison in comparisons if comparison.mismatches)
    first = differing.mismatches[0]
    num_different = sum(len(comparison.mismatches) for comparison in comparisons)
    return (
        f"TOKENS DIFFER in {num_different} of {sum(c.num_completions for c in comparisons)} "
        f"completions, first with {differing.load} in prompt {first.prompt_index} at token "
        f"{first.position}"
    )


def describe_gains(comparisons: Sequence[Comparison]) -> str:
    """Return the headline: what each number of requests gains, and that no token changes."""
    gains = [
        f"{comparison.load}: {comparison.speedup:.2f} times plain vLLM "
        f"({comparison.layerskip.tokens_per_s:.0f} against "
        f"{comparison.plain.tokens_per_s:.0f} tokens a second)"
        for comparison in comparisons
    ]
    return "; ".join([*gains, describe_equality(comparisons)])


def _describe_range(speed: Speed) -> str:
    return f"{min(speed.tokens_per_s_by_round):.0f} to {max(speed.tokens_per_s_by_round):.0f}"


def build_table(comparisons: Sequence[Comparison], setting: RunSetting) -> Table:
    """Lay the comparisons out for the terminal.

    Args:
        comparisons: The result, one for each number of requests.
        setting: What was run, for the lines below the table.

    Returns:
        The table.
    """
    table = Table(caption=setting.describe(), caption_justify="left", min_width=80)
    table.add_column("", no_wrap=True)
    for name in ("plain", "layerskip", "ratio"):
        table.add_column(name, justify="right")

    def add_ratio(name: str, plain: float, layerskip: float) -> None:
        table.add_row(name, f"{plain:.1f}", f"{layerskip:.1f}", f"{layerskip / plain:.2f}x")

    for comparison in comparisons:
        plain, layerskip, counters = comparison.plain, comparison.layerskip, comparison.counters
        table.add_row(comparison.load, style="bold")
        add_ratio("  tokens a second", plain.tokens_per_s, layerskip.tokens_per_s)
        if setting.num_rounds > 1:
            table.add_row(
                "    slowest to fastest round", _describe_range(plain), _describe_range(layerskip)
            )
        add_ratio("  time to first token, ms", plain.ttft_ms, layerskip.ttft_ms)
        add_ratio("  time per output token, ms", plain.tpot_ms, layerskip.tpot_ms)
        table.add_row("  mean acceptance length", "1.00", f"{counters.mean_acceptance_length:.2f}")
        shares = " ".join(f"{share:.0%}" for share in counters.acceptance_by_position)
        table.add_row("  accepted by position", "", shares, end_section=True)
    return table


def comparisons_to_json(comparisons: Sequence[Comparison], setting: RunSetting) -> dict[str, Any]:
    """Return everything that was measured, with the setting, as a JSON object."""
    return {
        "headline": describe_gains(comparisons),
        "every_token_same": is_every_token_same(comparisons),
        "setting": dataclasses.asdict(setting) | {"drafting": setting.drafting.model_dump()},
        "comparisons": [
            dataclasses.asdict(comparison)
            | {
                "speedup": comparison.speedup,
                "acceptance_by_position": comparison.counters.acceptance_by_position,
                "mean_acceptance_length": comparison.counters.mean_acceptance_length,
            }
            for comparison in comparisons
        ],
    }
