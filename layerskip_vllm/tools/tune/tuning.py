"""Times steps, predicts all designs, and tries the best few, for `layerskip-vllm tune`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerskip_vllm.tools.bench.engine_run import EngineFacts
from layerskip_vllm.tools.hardware import list_gpu_names
from layerskip_vllm.tools.output import describe_duration
from layerskip_vllm.tools.speedup_bound import bound_speedup
from layerskip_vllm.tools.tune.designs import (
    Design,
    Speedups,
    choose_lengths,
    choose_trials,
    make_settings,
    predict_speedups,
)
from layerskip_vllm.tools.tune.drafts import DraftRecord
from layerskip_vllm.tools.tune.engine_run import TunedEngine
from layerskip_vllm.tools.tune.engines import TimedEngine, open_engine
from layerskip_vllm.tools.tune.step_costs import Load, StepCosts
from layerskip_vllm.tools.tune.trials import NUM_TURNS, Trial, TrialOutcome, plan_trials, run_turns

LONGEST_DRAFT = 8
_TIMED_S = 0.3  # for the steps of each batch size and K

Track = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Tuning:
    """All that was found out."""

    facts: EngineFacts  # of plain vLLM's engine
    costs: StepCosts
    predictions: Sequence[Speedups]
    outcome: TrialOutcome
    settings: Mapping[str, Any]  # what vLLM's `speculative_config` takes, of what is fastest


@dataclass(frozen=True)
class Tuner:
    """One run of it."""

    engine: Mapping[str, Any]  # arguments of plain vLLM's `LLM`
    speculative: Mapping[str, Any]  # settings that every design has
    record: DraftRecord
    designs: Sequence[Design]
    prompts: Sequence[list[int]]
    batch_sizes: Sequence[int]
    folder: Path  # for logs
    ends_at: float  # by `time.monotonic`
    track: Track
    say: Callable[[str], None]

    def run(self) -> Tuning:
        """Time, predict and try; a ValueError says which engine failed, with its log's end."""
        with self._start("plain", None) as plain:
            costs, timed = self._time_all(plain)
            least_reused = timed.least_reused
            if self.speculative.get("reuse_exit_states") == "on":
                least_reused = 1
            predictions = [
                predict_speedups(design, self.record, costs, least_reused)
                for design in self._list_possible(plain.about.facts.runner)
            ]
            plan = plan_trials(costs.plain, timed.start_s, self.ends_at - time.monotonic())
            chosen = choose_trials(predictions, plan.num_trials)
            self.say(
                f"{len(predictions)} ways to draft were weighed; the best {len(chosen)} are tried, "
                f"for about {describe_duration(len(chosen) * plan.seconds)}"
            )
            outcome = self._try(plain, chosen, plan.max_tokens)
            best = outcome.best
            is_open = "enable_adaptive_verification" not in self.speculative  # which "auto" refuses
            if best.measured.follows_load and is_open:
                outcome = replace(outcome, auto=self._try_auto(plain, best, plan.max_tokens))
        settings = make_settings(best.design, best.lengths, outcome.is_auto)
        return Tuning(
            plain.about.facts, costs, predictions, outcome, {**settings, **self.speculative}
        )

    def _time_all(self, plain: TimedEngine) -> tuple[StepCosts, TunedEngine]:
        """Time steps of plain vLLM and of two exit layers: the others lie on a line with these."""
        exit_layers = choose_timed_exits(self.record)
        lengths = range(LONGEST_DRAFT + 1)
        num_timed = len(self.batch_sizes) * (1 + len(lengths) * len(exit_layers))
        advance = self.track("step costs", num_timed)
        batches = {b: list(self.prompts[:b]) for b in self.batch_sizes}
        plain_s = {}
        for batch_size, batch in batches.items():
            plain_s[batch_size] = plain.time_steps(batch, None, _TIMED_S)
            advance(1)
        timed: dict[int, dict[Load, float]] = {}
        for exit_layer in exit_layers:
            settings = make_settings(Design(exit_layer), {1: LONGEST_DRAFT})
            seconds = timed[exit_layer] = {}
            with self._start(f"timed-E{exit_layer}", settings) as engine:
                for batch_size, batch in batches.items():
                    for k in lengths:
                        seconds[batch_size, k] = engine.time_steps(batch, k, _TIMED_S)
                        advance(1)
        record = self.record
        costs = StepCosts.fit(record.num_layers, record.head_layers, plain_s, timed)
        return costs, engine.about

    def _list_possible(self, runner: str) -> list[Design]:
        """Leave out what this machine refuses; if that is all, an engine shall say why."""
        is_cpu = not list_gpu_names()
        return [
            design
            for design in self.designs
            if (is_cpu or not design.reuses) and (is_cpu or runner == "V2" or not design.looks_up)
        ] or list(self.designs)

    def _try(self, plain: TimedEngine, chosen: Sequence[Speedups], max_tokens: int) -> TrialOutcome:
        advance = self.track("trials", len(chosen) * len(self.batch_sizes) * NUM_TURNS)
        trials = []
        for number, predicted in enumerate(chosen, start=1):
            lengths = choose_lengths(predicted, LONGEST_DRAFT)
            longest = max(map(max, lengths.values()))
            settings = make_settings(predicted.design, {1: longest})
            with self._start(f"trial-{number}", settings) as engine:
                measured = run_turns(plain, engine, self.prompts, lengths, max_tokens, advance)
            trials.append(Trial(predicted, Speedups(predicted.design, measured)))
        return TrialOutcome(trials, None)

    def _try_auto(self, plain: TimedEngine, best: Trial, max_tokens: int) -> dict[int, float]:
        advance = self.track("K auto", len(self.batch_sizes) * NUM_TURNS)
        settings = make_settings(best.design, best.lengths, is_auto=True)
        lengths = {batch_size: [None] for batch_size in self.batch_sizes}
        with self._start("auto", settings) as engine:
            measured = run_turns(plain, engine, self.prompts, lengths, max_tokens, advance)
        return {batch_size: speedup for (batch_size, _), speedup in measured.items()}

    def _start(
        self, name: str, settings: Mapping[str, Any] | None
    ) -> AbstractContextManager[TimedEngine]:
        if settings is None:
            return open_engine(name, self.engine, self.folder)
        speculative = {**settings, **self.speculative}
        engine = {**self.engine, "speculative_config": speculative}
        return open_engine(name, engine, self.folder)


def choose_timed_exits(record: DraftRecord) -> list[int]:
    """Choose two exit layers to time: the best by bytes, and one twice or half as deep."""
    whole = record.num_layers + record.head_layers

    def bound(exit_layer: int) -> float:
        share = (exit_layer + record.head_layers) / whole
        return max(
            bound_speedup(share, k, record.play(exit_layer, k).num_tokens - 1)
            for k in range(1, LONGEST_DRAFT + 1)
        )

    best = max(range(1, record.num_layers), key=bound)
    other = 2 * best if 2 * best < record.num_layers else best // 2
    return sorted({best, max(1, other)})
