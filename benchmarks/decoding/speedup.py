"""Measures what layer-skip drafting gains, side by side with vLLM's other ways of decoding.

Every system is an engine in a process of its own. All are loaded first and then take turns, one
round each, so that the machine's moods hit all of them alike.
Prefill is left out: a round counts the tokens after the first, from the first token to the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.decoding.engines import Engine, Measurement, StepTimes, run_engines
from benchmarks.decoding.speedup_report import (
    BYTES_PER_WEIGHT,
    describe_run,
    make_engine_table,
    make_speedup_table,
    speedups_to_json,
)
from benchmarks.decoding.speedup_summary import Load, find_missed_thresholds, summarize
from benchmarks.decoding.synthetic_checkpoint import (
    DEFAULT_FOLDER,
    SyntheticCheckpoint,
    make_shape,
    read_checkpoint,
)
from benchmarks.decoding.synthetic_model import MAX_POSITIONS
from benchmarks.decoding.synthetic_spec import PRESETS, make_prompts
from benchmarks.decoding.systems import (
    DEFAULT_SYSTEMS,
    MARGIN_TOKENS,
    find_loads,
    make_engine_args,
    parse_system,
)
from benchmarks.decoding.trained_checkpoint import (
    cut_first_layers,
    make_code_prompts,
    read_draft_settings,
)
from benchmarks.decoding.weight_counts import count_weights
from layerskip_vllm.drafting.cpu_dtypes import is_emulated
from layerskip_vllm.tools.hardware import list_gpu_names
from layerskip_vllm.tools.output import make_console, write_json

LOG_FOLDER = Path("benchmark-output/logs")
NUM_WARM_UP_TOKENS = 24
_LEAST = {"repeats": 1, "num_prompt_tokens": 1, "max_tokens": 2, "num_speculative_tokens": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and returns the exit status."""
    options = parse_options(arguments)
    checkpoint = prepare_checkpoint(options)
    counts = count_weights(checkpoint.config)
    engine_args = {
        system: make_engine_args(system, options, checkpoint) for system in options.systems
    }
    with run_engines(engine_args, LOG_FOLDER, options.engine_process) as engines:
        results = time_engines(engines, options, checkpoint)
        step_times = time_all_steps(engines, options)
        facts = {engine.system: engine.facts for engine in engines}
    summaries = [
        dataclasses.replace(line, step_times=step_times.get((line.load, line.system)))
        for line in summarize(results, counts, options)
    ]
    notes = describe_run(checkpoint, counts, facts, summaries, options)
    console = make_console()
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print(make_speedup_table(summaries, options))
    console.print(make_engine_table(facts, counts, options))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, speedups_to_json(notes, facts, results, summaries))
    missed = find_missed_thresholds(summaries) if options.check else []
    for words in missed:
        console.print(f"missed at batch 1: {words}", style="red")
    return 1 if missed else 0


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line.

    Args:
        arguments: The words after the command; the process's own when None.

    Returns:
        The options, with the defaults that hang on the machine filled in.

    Raises:
        ValueError: If a number is out of range. The message names the field and its value.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoding.speedup", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="default: cpu-0.6b, on a GPU gpu-1b"
    )
    parser.add_argument(
        "--model", type=Path, help="a trained checkpoint, in a preset's place; on held-out code"
    )
    parser.add_argument(
        "--exit-layer", type=int, help="E (default: the checkpoint's, or a quarter of the layers)"
    )
    parser.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="K",
        help="the most, with +auto (default: the checkpoint's, or 4)",
    )
    parser.add_argument("--acceptance", type=float, default=0.72, help="of the checkpoint to make")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each system")
    parser.add_argument("--num-prompt-tokens", type=int, default=16)
    parser.add_argument(
        "--num-long-prompt-tokens", type=int, help="one request at a time has such a prompt, too"
    )
    parser.add_argument("--max-tokens", type=int, help="tokens a text (default: 128, on a GPU 512)")
    parser.add_argument(
        "--systems",
        nargs="+",
        type=parse_system,
        default=list(DEFAULT_SYSTEMS),
        help="layerskip may have speed settings after it: layerskip+auto+draft_vocab",
    )
    parser.add_argument("--draft-vocab", type=Path, help="the file for systems with +draft_vocab")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--dtype",
        choices=sorted(BYTES_PER_WEIGHT),
        help="default: bfloat16, on a CPU that emulates it float32",
    )
    parser.add_argument(
        "--enforce-eager", action="store_true", help="no torch.compile, no CUDA graphs"
    )
    parser.add_argument(
        "--engine-process",
        action=argparse.BooleanOptionalAction,
        help="as `LLM` runs by default (default: on a GPU, where one process starves plain vLLM)",
    )
    parser.add_argument(
        "--kv-cache-gib", type=float, help="for each engine (default: what the texts need)"
    )
    parser.add_argument(
        "--dummy-weights",
        action="store_true",
        help="of the shape alone: no checkpoint is made, and a GPU's acceptance is as given",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if a threshold is missed at batch 1"
    )
    options = parser.parse_args(arguments)
    is_on_gpu = bool(list_gpu_names())
    if options.model and (options.preset or options.dummy_weights):
        raise ValueError("--model excludes --preset and --dummy-weights; leave one out.")
    options.preset = options.preset or ("gpu-1b" if is_on_gpu else "cpu-0.6b")
    options.dtype = options.dtype or _choose_dtype(is_on_gpu)
    options.max_tokens = options.max_tokens or (512 if is_on_gpu else 128)
    if options.engine_process is None:
        options.engine_process = is_on_gpu
    # vLLM has no synthetic acceptance on the CPU's model runner.
    options.is_acceptance_given = options.dummy_weights and is_on_gpu
    exit_layer, num_tokens = PRESETS[options.preset].exit_layer, 4
    if options.model:
        settings = read_draft_settings(options.model)
        exit_layer, num_tokens = settings.exit_layer.value, settings.num_speculative_tokens.value
    options.exit_layer = options.exit_layer or exit_layer
    if options.num_speculative_tokens is None:
        options.num_speculative_tokens = num_tokens
    for name, least in _LEAST.items():
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {getattr(options, name)}; it must be at least {least}.")
    if min(options.batch_sizes) < 1:
        raise ValueError(f"--batch-sizes has {min(options.batch_sizes)}; all must be at least 1.")
    longest = max(load.num_prompt_tokens for load in find_loads(options))
    if not options.model and longest + options.max_tokens + MARGIN_TOKENS > MAX_POSITIONS:
        raise ValueError(
            f"The longest prompt and --max-tokens are {longest} and {options.max_tokens} tokens; "
            f"together they must be at most {MAX_POSITIONS - MARGIN_TOKENS}."
        )
    needs_draft_vocab = any("+draft_vocab" in system for system in options.systems)
    if needs_draft_vocab and options.draft_vocab is None and not options.is_acceptance_given:
        raise ValueError(
            "--systems has +draft_vocab, but --draft-vocab is not given; give a file that "
            "`layerskip-vllm draft-vocab` wrote."
        )
    is_enough = {"plain", "layerskip", "draft_model"} <= set(options.systems)
    if options.check and not (is_enough and 1 in options.batch_sizes):
        raise ValueError(
            "--check needs batch size 1 and the systems plain, layerskip, draft_model."
        )
    return options


def _choose_dtype(is_on_gpu: bool) -> str:
    device_type = "cuda" if is_on_gpu else "cpu"
    return "float32" if is_emulated("bfloat16", device_type) else "bfloat16"


def prepare_checkpoint(options: argparse.Namespace) -> SyntheticCheckpoint:
    """Make the checkpoint in a process of its own, so that no engine shares its memory."""
    if options.model:
        return cut_first_layers(options.model, options.exit_layer, options.checkpoints)
    spec = dataclasses.replace(
        PRESETS[options.preset],
        exit_layer=options.exit_layer,
        num_speculative_tokens=options.num_speculative_tokens,
        acceptance=options.acceptance,
        seed=options.seed,
    )
    if options.dummy_weights:
        return make_shape(spec, options.checkpoints)
    command = [sys.executable, "-m", "benchmarks.decoding.synthetic_checkpoint"]
    for name in ("preset", "exit_layer", "num_speculative_tokens", "acceptance", "seed"):
        command += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    command += ["--folder", str(options.checkpoints)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_checkpoint(options.checkpoints / spec.name())


def time_engines(
    engines: Sequence[Engine], options: argparse.Namespace, checkpoint: SyntheticCheckpoint
) -> dict[Load, dict[str, list[Measurement]]]:
    """Run all rounds, the engines in turn, and return them by load and system."""
    results: dict[Load, dict[str, list[Measurement]]] = {}
    for load in find_loads(options):
        size = load.batch_size
        prompts = draw_prompts(options, checkpoint, load)
        by_system: dict[str, list[Measurement]] = {engine.system: [] for engine in engines}
        for engine in engines:
            engine.run_round(prompts[-size:], NUM_WARM_UP_TOKENS, options.temperature)
        for repeat in range(options.repeats):
            batch = prompts[repeat * size : (repeat + 1) * size]
            for engine in engines:
                measurement = engine.run_round(batch, options.max_tokens, options.temperature)
                by_system[engine.system].append(measurement)
        results[load] = by_system
    return results


def draw_prompts(
    options: argparse.Namespace, checkpoint: SyntheticCheckpoint, load: Load
) -> list[list[int]]:
    """Return prompts for all rounds of a load and for one more."""
    num_prompts, num_tokens = load.batch_size * (options.repeats + 1), load.num_prompt_tokens
    if options.model:
        return make_code_prompts(options.model, num_prompts, num_tokens)
    vocab_size = checkpoint.config["vocab_size"]
    return make_prompts(vocab_size, num_prompts, num_tokens, options.seed + 1)


def time_all_steps(
    engines: Sequence[Engine], options: argparse.Namespace
) -> dict[tuple[Load, str], StepTimes | None]:
    """Time steps in the middle of a text, by load and system; on a GPU alone."""
    if not list_gpu_names():
        return {}
    return {
        (load, engine.system): engine.time_steps(
            load.batch_size, load.num_prompt_tokens + options.max_tokens // 2
        )
        for load in find_loads(options)
        for engine in engines
    }


if __name__ == "__main__":
    sys.exit(main())
