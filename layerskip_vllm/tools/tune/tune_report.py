"""What `layerskip-vllm tune` prints and writes."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from layerskip_vllm.tools.hardware import describe_hardware
from layerskip_vllm.tools.tune.designs import Speedups, geometric_mean
from layerskip_vllm.tools.tune.drafts import DraftRecord
from layerskip_vllm.tools.tune.trials import Trial
from layerskip_vllm.tools.tune.tuning import LONGEST_DRAFT, Tuning


@dataclass(frozen=True)
class TuneReport:
    """All that a run gave."""

    model: str  # path or name
    data: Sequence[str]
    engine_args: Mapping[str, Any]  # of plain vLLM's `LLM`
    record: DraftRecord
    tuning: Tuning
    seconds: float  # that it took

    @property
    def entry(self) -> dict[str, int]:
        """The `layerskip` entry for `config.json`, whose K is one number."""
        best = self.tuning.outcome.best
        return {
            "exit_layer": best.design.exit_layer,
            "num_speculative_tokens": best.measured.length,
        }

    def describe(self) -> str:
        """Return the result in one sentence."""
        outcome = self.tuning.outcome
        words = f"{outcome.best.design.describe()}, {self.describe_length()}"
        speeds = ", ".join(f"{speedup:.2f}" for speedup in outcome.speedups.values())
        sizes = ", ".join(map(str, outcome.speedups))
        gain = f"{speeds} times plain vLLM's tokens a second with {sizes} requests at once"
        return f"{words}: {gain}" if outcome.pays else f"Nothing pays; at best {words}: {gain}"

    def describe_length(self) -> str:
        """Return the best K in words."""
        outcome = self.tuning.outcome
        return "K auto" if outcome.is_auto else f"K = {_list_lengths(outcome.best.lengths)}"

    def describe_run(self) -> str:
        """Return one line with what was measured, and on what."""
        first, *others = self.data
        data = Path(first).name + (f" and {len(others)} more" if others else "")
        facts = self.tuning.facts
        return (
            f"{Path(self.model).name} ({facts.dtype}), greedy completions of {data}; Model Runner "
            f"{facts.runner}, {describe_hardware()}"
        )

    def build_table(self) -> Table:
        """Lay the trials out, with what was predicted and measured by batch size."""
        outcome = self.tuning.outcome
        table = Table(
            title="Tried: times plain vLLM's tokens a second, predicted and measured",
            caption=f"{self.describe_run()}; medians of turns, {self.seconds / 60:.1f} minutes",
            caption_justify="left",
        )
        table.add_column("design")
        sizes = outcome.best.measured.batch_sizes
        for heading in ("K", *(f"{size} at once" for size in sizes), "mean"):
            table.add_column(heading, justify="right", no_wrap=True)
        for trial in outcome.trials:
            is_best = trial is outcome.best and not outcome.is_auto
            table.add_row(*_list_cells(trial), style="bold green" if is_best else None)
        if outcome.auto is not None:
            cells = [f"      {outcome.auto[size]:.2f}" for size in sizes]
            mean = f"{geometric_mean(outcome.auto.values()):.2f}"
            words = outcome.best.design.describe()
            style = "bold green" if outcome.is_auto else None
            table.add_row(words, "auto", *cells, mean, style=style)
        return table

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        tuning, outcome = self.tuning, self.tuning.outcome
        packages = ("layerskip-vllm", "vllm", "torch", "transformers")
        acceptance = {
            exit_layer: [
                (self.record.play(exit_layer, k).num_tokens - 1) / k
                for k in range(1, LONGEST_DRAFT + 1)
            ]
            for exit_layer in range(1, self.record.num_layers)
        }
        return {
            "model": self.model,
            "data": list(self.data),
            "engine_args": dict(self.engine_args),
            "speculative_config": dict(tuning.settings) if outcome.pays else None,
            "speedup_by_batch_size": dict(outcome.speedups),
            "trials": [
                {
                    **asdict(trial.design),
                    "num_speculative_tokens_by_batch_size": trial.lengths,
                    "predicted": _list_speedups(trial.predicted),
                    "measured": _list_speedups(trial.measured),
                }
                for trial in outcome.trials
            ],
            "auto": outcome.auto,
            "predictions": [
                {
                    **asdict(prediction.design),
                    "num_speculative_tokens_by_batch_size": prediction.lengths,
                    "speedup": prediction.score,
                }
                for prediction in tuning.predictions
            ],
            "acceptance_by_exit_layer_and_length": acceptance,
            "step_costs": tuning.costs.to_json(),
            "engine": asdict(tuning.facts),
            "hardware": describe_hardware(),
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in packages},
            "seconds": self.seconds,
        }


def _list_cells(trial: Trial) -> list[str]:
    predicted, measured = trial.predicted.by_load, trial.measured.by_load
    speeds = [f"{predicted[load]:.2f}  {measured[load]:.2f}" for load in trial.lengths.items()]
    return [trial.design.describe(), _list_lengths(trial.lengths), *speeds, f"{trial.score:.2f}"]


def _list_lengths(lengths: Mapping[int, int]) -> str:
    """Say K: one number, or that of each batch size."""
    values = list(lengths.values())
    return ", ".join(map(str, values if len(set(values)) > 1 else values[:1]))


def _list_speedups(speedups: Speedups) -> list[dict[str, float]]:
    return [
        {"batch_size": b, "num_speculative_tokens": k, "speedup": speedup}
        for (b, k), speedup in speedups.by_load.items()
    ]
