"""Sweeps over E, K, lookup and reuse of exit states, and holds what `tune` chose against the best.

Each E and kind is an engine that takes turns with plain vLLM, over all K and batch sizes. What is
the best of so many had luck too: it takes turns once more at the end, as what `tune` chose does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import AutoTokenizer

from layerskip_vllm.tools.output import make_console, make_progress, write_json
from layerskip_vllm.tools.text import encode_documents, read_documents
from layerskip_vllm.tools.tune.designs import (
    ALL_TOKENS,
    Design,
    Speedups,
    geometric_mean,
    list_designs,
    make_settings,
)
from layerskip_vllm.tools.tune.engines import open_engine
from layerskip_vllm.tools.tune.preparation import NUM_PROMPTS, cut_trial_prompts
from layerskip_vllm.tools.tune.trials import NUM_TURNS, Trial, run_turns
from layerskip_vllm.tools.tune.tuning import LONGEST_DRAFT

FOLDER = Path("benchmark-output/tune-sweep")
NUM_FINALISTS = 3
NUM_FINAL_ROUNDS = 2
TUNED = "what tune chose"


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, and print what `tune` chose beside the best.

    Args:
        arguments: The words after the command; the process's own when None.

    Returns:
        The exit status.
    """
    options = parse_sweep_options(arguments)
    tuned = json.loads(options.tuned.read_text(encoding="utf-8"))
    batch_sizes = [int(size) for size in tuned["speedup_by_batch_size"]]
    tokenizer = AutoTokenizer.from_pretrained(tuned["model"])
    text = encode_documents(tokenizer, read_documents(tuned["data"]))
    prompts = cut_trial_prompts(text, max(NUM_PROMPTS, *batch_sizes))
    console = make_console()
    with (
        open_engine("plain", tuned["engine_args"], FOLDER) as plain,
        make_progress(console) as progress,
    ):

        def track(what: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=total)
            return lambda num: progress.advance(task, num)

        def measure(
            settings: Mapping[str, Any],
            lengths: Sequence[Any],
            advance: Callable[[int], None],
        ) -> dict[tuple[int, Any], float]:
            engine_args = {**tuned["engine_args"], "speculative_config": settings}
            with open_engine("swept", engine_args, FOLDER) as engine:
                loads = dict.fromkeys(batch_sizes, lengths)
                return run_turns(plain, engine, prompts, loads, options.max_tokens, advance)

        trials = sweep(options, measure, track, len(batch_sizes))
        finalists = {TUNED: tuned["speculative_config"]}
        for trial in trials[:NUM_FINALISTS]:
            name = f"{trial.design.describe()}, K = {[*trial.lengths.values()]}"
            finalists[name] = make_settings(trial.design, trial.lengths)
        advance = track("finals", NUM_FINAL_ROUNDS * len(finalists) * len(batch_sizes) * NUM_TURNS)
        finals: dict[str, list[float]] = {name: [] for name in finalists}
        for _ in range(NUM_FINAL_ROUNDS):
            for name, settings in finalists.items():
                finals[name].append(geometric_mean(measure(settings, [None], advance).values()))
    scores = {name: geometric_mean(rounds) for name, rounds in finals.items()}
    console.print(make_sweep_table(trials, batch_sizes))
    for name, score in scores.items():
        ratio = scores[TUNED] / score
        console.print(f"{score:.3f} times plain: {name} ({ratio:.3f})", soft_wrap=True)
    write_json(
        FOLDER / "sweep.json", {"finals": finals, "sweep": [to_json(each) for each in trials]}
    )
    return 0


def parse_sweep_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: The words after the command; the process's own when None.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoding.tune_sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tuned", type=Path, default=Path("tune-output/tune.json"))
    parser.add_argument("--exit-layers", type=int, nargs="+", default=list(range(2, 13)))
    parser.add_argument("--max-tokens", type=int, default=128, help="of a round")
    parser.add_argument("--no-lookup", action="store_true", help="leave it out")
    parser.add_argument("--no-reuse", action="store_true", help="leave it out")
    return parser.parse_args(arguments)


def sweep(
    options: argparse.Namespace,
    measure: Callable[..., dict[tuple[int, Any], float]],
    track: Callable[[str, int], Callable[[int], None]],
    num_batch_sizes: int,
) -> list[Trial]:
    """Measure every exit layer and kind.

    Args:
        options: What to sweep over.
        measure: Takes settings, all K, and a function to call after each turn; returns speed-ups.
        track: Begins a progress bar.
        num_batch_sizes: Of each measurement.

    Returns:
        The trials, the best first.
    """
    lookups = [False] if options.no_lookup else [False, True]
    reuses = [False] if options.no_reuse else [False, True]
    all_designs = list_designs(1 + max(options.exit_layers), [ALL_TOKENS], lookups, reuses)
    designs = [design for design in all_designs if design.exit_layer in options.exit_layers]
    advance = track("sweep", len(designs) * num_batch_sizes * NUM_TURNS)
    lengths = list(range(LONGEST_DRAFT + 1))
    trials = []
    for design in designs:
        settings = make_settings(design, {1: LONGEST_DRAFT})
        speedups = Speedups(design, measure(settings, lengths, advance))
        trials.append(Trial(speedups, speedups))
    return sorted(trials, key=lambda trial: -trial.score)


def make_sweep_table(trials: Sequence[Trial], batch_sizes: Sequence[int]) -> Table:
    """Lay the sweep out, the best first.

    Args:
        trials: In this order.
        batch_sizes: A column each.

    Returns:
        The table, with the speed-up and the K of each batch size.
    """
    table = Table("design", *(f"{size} at once" for size in batch_sizes), "mean")
    for trial in trials:
        cells = (f"{trial.speedups[b]:.2f}  K = {k}" for b, k in trial.lengths.items())
        table.add_row(trial.design.describe(), *cells, f"{trial.score:.2f}")
    return table


def to_json(trial: Trial) -> dict[str, Any]:
    """Return a design with all that was measured of it.

    Args:
        trial: The design.

    Returns:
        A JSON object.
    """
    design: Design = trial.design
    return {
        "design": design.describe(),
        "speedups": [[b, k, speedup] for (b, k), speedup in trial.measured.by_load.items()],
    }


if __name__ == "__main__":
    sys.exit(main())
