"""Shows a comparison as a table in the terminal and writes it as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.serving.comparison import Comparison, Speed


@dataclass(frozen=True)
class RunSetting:
    """What was run, and on what.

    Attributes:
        model: The model's path or name.
        exit_layer: The layer after which drafts leave the model.
        num_layers: All of the model's layers.
        num_speculative_tokens: Tokens in a draft.
        dtype: The model's data type.
        num_prompts: Prompts a round.
        num_rounds: Rounds on each server.
        max_tokens: Most tokens a completion.
        concurrency: Requests open at once.
        hardware: The machine.
        versions: Versions of what was measured, by name.
        commands: Each server's command line without its port, by the server's name.
    """

    model: str
    exit_layer: int
    num_layers: int
    num_speculative_tokens: int
    dtype: str
    num_prompts: int
    num_rounds: int
    max_tokens: int
    concurrency: int
    hardware: str
    versions: Mapping[str, str]
    commands: Mapping[str, str]

    def describe_run(self) -> str:
        """Returns one line with what was run."""
        return (
            f"{Path(self.model).name} ({self.dtype}), drafts of {self.num_speculative_tokens} "
            f"from the first {self.exit_layer} of {self.num_layers} layers"
        )

    def describe_load(self) -> str:
        """Returns one line with what was sent."""
        rounds = "1 round" if self.num_rounds == 1 else f"median of {self.num_rounds} rounds"
        return (
            f"{self.concurrency} requests at once, {self.num_prompts} held-out prompts, "
            f"up to {self.max_tokens} tokens each, greedy; {rounds}"
        )

    def describe_machine(self) -> str:
        """Returns one line with the machine and the versions."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.hardware}; {versions}"


def describe_equality(comparison: Comparison) -> str:
    """Returns whether every token was the same, with the numbers that say so."""
    if comparison.is_every_token_same:
        return f"yes, all {comparison.num_tokens:,}"
    first = comparison.mismatches[0]
    return (
        f"NO, {len(comparison.mismatches)} of {comparison.num_completions} completions differ; "
        f"prompt {first.prompt_index} at token {first.position}"
    )


def describe_range(speed: Speed) -> str:
    """Returns the tokens a second of the slowest and of the fastest round."""
    return f"{min(speed.tokens_per_s_by_round):.0f} to {max(speed.tokens_per_s_by_round):.0f}"


def build_table(comparison: Comparison, setting: RunSetting) -> Table:
    """Lays the comparison out for the terminal.

    Args:
        comparison: The result.
        setting: What was run, for the lines below the table.

    Returns:
        The table.
    """
    plain, layerskip = comparison.plain, comparison.layerskip
    caption = (setting.describe_run(), setting.describe_load(), setting.describe_machine())
    table = Table(
        title="LayerSkip self-speculative decoding in vLLM",
        caption="\n".join(caption),
        caption_justify="left",
        min_width=80,
    )
    table.add_column("", no_wrap=True)
    table.add_column("plain", justify="right")
    table.add_column("layerskip", justify="right")
    table.add_column("ratio", justify="right")

    def add_ratio(name: str, plain_value: float, layerskip_value: float, ratio: float) -> None:
        table.add_row(name, f"{plain_value:.1f}", f"{layerskip_value:.1f}", f"{ratio:.2f}x")

    speeds = plain.tokens_per_s, layerskip.tokens_per_s
    add_ratio("tokens a second", *speeds, comparison.speedup)
    if setting.num_rounds > 1:
        table.add_row(
            "  slowest to fastest round", describe_range(plain), describe_range(layerskip)
        )
    ttfts_ms = plain.ttft_ms, layerskip.ttft_ms
    add_ratio("time to first token, ms", *ttfts_ms, layerskip.ttft_ms / plain.ttft_ms)
    tpots_ms = plain.tpot_ms, layerskip.tpot_ms
    add_ratio("time per output token, ms", *tpots_ms, layerskip.tpot_ms / plain.tpot_ms)
    table.add_section()
    for position, share in enumerate(comparison.counters.acceptance_by_position, start=1):
        table.add_row(f"acceptance at position {position}", "", f"{share:.1%}", "")
    table.add_row("tokens a step and request", "1.00", f"{comparison.counters.mean_acceptance_length:.2f}")
    table.add_section()
    style = "bold green" if comparison.is_every_token_same else "bold red"
    table.add_row("every token the same", "", describe_equality(comparison), "", style=style)
    return table


def to_json(comparison: Comparison, setting: RunSetting) -> dict[str, Any]:
    """Returns everything that was measured, with the setting, as a JSON object."""
    counters = comparison.counters
    return {
        "setting": dataclasses.asdict(setting),
        "plain": dataclasses.asdict(comparison.plain),
        "layerskip": dataclasses.asdict(comparison.layerskip),
        "speedup": comparison.speedup,
        "acceptance_by_position": list(counters.acceptance_by_position),
        "tokens_per_step": counters.mean_acceptance_length,
        "counters": dataclasses.asdict(counters),
        "every_token_same": comparison.is_every_token_same,
        "num_completions": comparison.num_completions,
        "num_tokens": comparison.num_tokens,
        "num_same_tokens": comparison.num_same_tokens,
        "mismatches": [dataclasses.asdict(mismatch) for mismatch in comparison.mismatches],
    }


def write_json(path: Path, comparison: Comparison, setting: RunSetting) -> None:
    """Writes `to_json` to `path`."""
    path.write_text(json.dumps(to_json(comparison, setting), indent=2) + "\n")
