"""Measures what layer-skip drafting gains, side by side with vLLM's other ways of decoding.

Every system is an engine in a process of its own. All are loaded first and then take turns, one
round each, so that the machine's moods hit all of them alike; a waiting engine sleeps on a pipe.
Prefill is left out: a round counts the tokens after the first, from the first token to the last.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cost_model import WeightCounts, bound_speedup, count_weights
from benchmarks.hardware import describe_hardware, list_gpu_names
from benchmarks.synthetic_checkpoint import (
    DEFAULT_FOLDER,
    MAX_POSITIONS,
    PRESETS,
    SyntheticCheckpoint,
    SyntheticSpec,
    make_prompts,
    read_checkpoint,
)

SYSTEMS = ("plain", "layerskip", "draft_model", "ngram")
LOG_FOLDER = Path("benchmark-output/logs")
NUM_WARM_UP_TOKENS = 24
MARGIN_TOKENS = 64  # room for drafts past the end of a text
BYTES_PER_WEIGHT = {"bfloat16": 2, "float16": 2, "float32": 4}
_LEAST = {"repeats": 1, "num_prompt_tokens": 1, "max_tokens": 2, "num_speculative_tokens": 1}
MIN_SHARE_OF_BOUND = 0.85
MIN_SPEEDUP = 1.5
ACCEPTED_METRIC = "vllm:spec_decode_num_accepted_tokens"
ROUNDS_METRIC = "vllm:spec_decode_num_drafts"
DRAFTED_METRIC = "vllm:spec_decode_num_draft_tokens"


@dataclass(frozen=True)
class Measurement:
    """What one engine did in one round.

    Attributes:
        tokens_per_s: Tokens after each request's first, by the time from the first to the last.
        prefill_s: Time to the first token.
        cpu_s: What the calling process used of the CPU in the round, prefill included: other
            programs disturb it less than they disturb a clock.
        num_rounds: Draft-and-verify rounds, summed over the requests.
        num_drafted: Drafted tokens.
        num_accepted: Accepted ones among them.
        tokens: Each request's tokens.
    """

    tokens_per_s: float
    prefill_s: float
    cpu_s: float
    num_rounds: int
    num_drafted: int
    num_accepted: int
    tokens: list[list[int]] = field(repr=False)


@dataclass(frozen=True)
class Facts:
    """What an engine takes and holds.

    Attributes:
        peak_memory_bytes: Most memory its process has held so far: on a GPU what PyTorch
            allocated there, else resident memory.
        num_kv_tokens: Tokens for which its KV cache has room.
        device: What it runs on, in vLLM's word.
        mode: "compiled" or "eager".
        num_threads: OpenMP threads.
    """

    peak_memory_bytes: int
    num_kv_tokens: int
    device: str
    mode: str
    num_threads: int


# --- In an engine's process ---------------------------------------------------------------------


def serve_engine(pipe: Connection, engine_args: dict[str, Any], log_path: Path) -> None:
    """Loads an engine and runs the rounds asked for over the pipe, until there is no more."""
    # Before vLLM is imported. One process has no IPC, no polling neighbour on a scarce core, and
    # memory that can be read off; `--engine-process` gives vLLM's default instead.
    is_engine_process = engine_args.pop("is_engine_process")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if is_engine_process else "0"
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        from vllm import LLM

        llm = LLM(**engine_args)
        pipe.send(_gather_facts(llm))
        while (ask := pipe.recv()) is not None:
            pipe.send(_run_round(llm, **ask))
            pipe.send(_gather_facts(llm))
    except Exception as error:
        traceback.print_exc()
        pipe.send(error)


def _run_round(
    llm: Any, prompts: list[list[int]], max_tokens: int, temperature: float
) -> Measurement:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=temperature, max_tokens=max_tokens, ignore_eos=True, detokenize=False, seed=0
    )
    before, cpu_s = _read_counters(llm), time.process_time()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
    )
    after, cpu_s = _read_counters(llm), time.process_time() - cpu_s
    times = [output.metrics for output in outputs]
    start = min(stamps.first_token_ts for stamps in times)
    end = max(stamps.last_token_ts for stamps in times)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return Measurement(
        tokens_per_s=sum(len(text) - 1 for text in tokens) / (end - start),
        prefill_s=start - min(stamps.queued_ts for stamps in times),
        cpu_s=cpu_s,
        num_rounds=after[ROUNDS_METRIC] - before[ROUNDS_METRIC],
        num_drafted=after[DRAFTED_METRIC] - before[DRAFTED_METRIC],
        num_accepted=after[ACCEPTED_METRIC] - before[ACCEPTED_METRIC],
        tokens=tokens,
    )


def _read_counters(llm: Any) -> dict[str, int]:
    counters = dict.fromkeys((ROUNDS_METRIC, DRAFTED_METRIC, ACCEPTED_METRIC), 0)
    for metric in llm.get_metrics():
        if metric.name in counters:
            counters[metric.name] += metric.value
    return counters


def _gather_facts(llm: Any) -> Facts:
    import torch

    config = llm.llm_engine.vllm_config
    device = config.device_config.device_type
    is_on_gpu = device == "cuda"
    return Facts(
        peak_memory_bytes=torch.cuda.max_memory_allocated()
        if is_on_gpu
        else _peak_resident_bytes(),
        num_kv_tokens=config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        device=device,
        mode="eager" if config.compilation_config.mode == 0 else "compiled",
        num_threads=torch.get_num_threads(),
    )


def _peak_resident_bytes() -> int:
    """Returns the peak resident memory of this process and the ones it started, summed."""
    processes, total = [os.getpid()], 0
    while processes:
        process = Path("/proc", str(processes.pop()))
        with contextlib.suppress(OSError):  # one that has just ended
            lines = (process / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
            for thread in (process / "task").iterdir():
                processes += [int(child) for child in (thread / "children").read_text().split()]
    return total


# --- In the parent ------------------------------------------------------------------------------


class Engine:
    """An engine in a process of its own, told over a pipe what to run."""

    def __init__(self, system: str, engine_args: dict[str, Any], log_folder: Path) -> None:
        """Starts the process and waits until the engine is loaded."""
        self.system = system
        self.facts: Facts
        self._log_path = log_folder / f"{system}.log"
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve_engine, args=(theirs, engine_args, self._log_path)
        )
        self._process.start()
        theirs.close()
        self.facts = self._receive()

    def run_round(
        self, prompts: list[list[int]], max_tokens: int, temperature: float
    ) -> Measurement:
        """Runs one round there and returns what it measured."""
        self._pipe.send({"prompts": prompts, "max_tokens": max_tokens, "temperature": temperature})
        measurement = self._receive()
        self.facts = self._receive()
        return measurement

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(
                f"the engine of {self.system!r} ended; see {self._log_path}"
            ) from error
        if isinstance(answer, Exception):
            raise RuntimeError(
                f"the engine of {self.system!r} failed; see {self._log_path}"
            ) from answer
        return answer


@contextlib.contextmanager
def run_engines(
    options: argparse.Namespace, checkpoint: SyntheticCheckpoint
) -> Iterator[list[Engine]]:
    """Loads the engines one after another, and ends them whatever happens."""
    LOG_FOLDER.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        engines = []
        for system in options.systems:
            engine = Engine(system, make_engine_args(system, options, checkpoint), LOG_FOLDER)
            stack.callback(engine.stop)
            engines.append(engine)
        yield engines


def make_engine_args(
    system: str, options: argparse.Namespace, checkpoint: SyntheticCheckpoint
) -> dict[str, Any]:
    """Returns what `LLM` gets: the same for all systems but for the speculative configuration."""
    num_tokens = {"num_speculative_tokens": options.num_speculative_tokens}
    speculative_config: dict[str, Any] | None = {
        "plain": None,
        "layerskip": {"method": "layerskip", "exit_layer": options.exit_layer, **num_tokens},
        "draft_model": {
            "method": "draft_model",
            "model": str(checkpoint.draft_folder.resolve()),
            **num_tokens,
        },
        "ngram": {"method": "ngram", "prompt_lookup_max": 4, **num_tokens},
    }[system]
    return {
        "model": str(checkpoint.folder.resolve()),
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "max_model_len": options.num_prompt_tokens + options.max_tokens + MARGIN_TOKENS,
        "max_num_seqs": max(options.batch_sizes),
        "kv_cache_memory_bytes": int(options.kv_cache_gib * 2**30),
        # With the bytes given, no more than what a GPU must have free when the engine starts.
        "gpu_memory_utilization": 0.9 / len(options.systems),
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "speculative_config": speculative_config,
        "is_engine_process": options.engine_process,
    }


def measure(
    engines: Sequence[Engine], options: argparse.Namespace, vocab_size: int
) -> dict[int, dict[str, list[Measurement]]]:
    """Runs all rounds, the engines in turn, and returns them by batch size and system."""
    num_prompts = max(options.batch_sizes) * (options.repeats + 1)
    prompts = make_prompts(vocab_size, num_prompts, options.num_prompt_tokens, options.seed + 1)
    results: dict[int, dict[str, list[Measurement]]] = {
        batch: {engine.system: [] for engine in engines} for batch in options.batch_sizes
    }
    for batch_size, by_system in results.items():
        for engine in engines:
            engine.run_round(prompts[-batch_size:], NUM_WARM_UP_TOKENS, options.temperature)
        for repeat in range(options.repeats):
            batch = prompts[repeat * batch_size : (repeat + 1) * batch_size]
            for engine in engines:
                measurement = engine.run_round(batch, options.max_tokens, options.temperature)
                by_system[engine.system].append(measurement)
    return results


@dataclass(frozen=True)
class Summary:
    """One line of the table: a system at a batch size, over all rounds.

    Attributes:
        batch_size: Requests decoded at once.
        system: What decoded.
        tokens_per_s: Median over the rounds.
        slowest: Tokens a second of the slowest round.
        fastest: And of the fastest.
        speedup: Median of the ratios to plain's round of the same turn.
        acceptance: Accepted by drafted tokens.
        accepted: Drafts accepted in a draft-and-verify round, on average.
        bound: What the weights read allow, in times plain (for drafts from the first E layers).
        share_of_bound: Speedup by bound.
        same_texts: Share of texts equal to plain's.
        same_tokens: Share of tokens before the first that is not plain's.
        prefill_s: Median time to the first token.
    """

    batch_size: int
    system: str
    tokens_per_s: float
    slowest: float
    fastest: float
    speedup: float | None
    acceptance: float | None
    accepted: float | None
    bound: float | None
    share_of_bound: float | None
    same_texts: float | None
    same_tokens: float | None
    prefill_s: float


def summarize(
    results: Mapping[int, Mapping[str, Sequence[Measurement]]],
    counts: WeightCounts,
    options: argparse.Namespace,
) -> list[Summary]:
    """Returns the table's lines: medians, and ratios of rounds of the same turn."""
    return [
        _summarize_system(batch_size, system, rounds, by_system.get("plain"), counts, options)
        for batch_size, by_system in results.items()
        for system, rounds in by_system.items()
    ]


def _summarize_system(
    batch_size: int,
    system: str,
    rounds: Sequence[Measurement],
    plain: Sequence[Measurement] | None,
    counts: WeightCounts,
    options: argparse.Namespace,
) -> Summary:
    rates = [each.tokens_per_s for each in rounds]
    speedup = bound = acceptance = accepted = None
    if plain:
        ratios = [ours / theirs.tokens_per_s for ours, theirs in zip(rates, plain, strict=True)]
        speedup = statistics.median(ratios)
    if num_rounds := sum(each.num_rounds for each in rounds):
        num_accepted = sum(each.num_accepted for each in rounds)
        acceptance = num_accepted / sum(each.num_drafted for each in rounds)
        accepted = num_accepted / num_rounds
        if system in ("layerskip", "draft_model"):
            bound = bound_speedup(
                counts, options.exit_layer, options.num_speculative_tokens, accepted
            )
    same_texts, same_tokens = compare_texts(rounds, plain) if plain else (None, None)
    return Summary(
        batch_size=batch_size,
        system=system,
        tokens_per_s=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        speedup=speedup,
        acceptance=acceptance,
        accepted=accepted,
        bound=bound,
        share_of_bound=speedup / bound if speedup and bound else None,
        same_texts=same_texts,
        same_tokens=same_tokens,
        prefill_s=statistics.median(each.prefill_s for each in rounds),
    )


def compare_texts(
    rounds: Sequence[Measurement], plain: Sequence[Measurement]
) -> tuple[float, float]:
    """Returns the share of texts equal to plain's, and of tokens before the first difference."""
    num_texts = num_equal = num_tokens = num_same = 0
    for ours, theirs in zip(rounds, plain, strict=True):
        for text, reference in zip(ours.tokens, theirs.tokens, strict=True):
            differences = (i for i, token in enumerate(reference) if text[i] != token)
            first = next(differences, len(reference))
            num_texts, num_equal = num_texts + 1, num_equal + (first == len(reference))
            num_tokens, num_same = num_tokens + len(reference), num_same + first
    return num_equal / num_texts, num_same / num_tokens


def find_missed_bars(summaries: Sequence[Summary]) -> list[str]:
    """Returns in words what layerskip misses at batch 1; nothing if it meets every bar.

    Args:
        summaries: All lines of the table.

    Returns:
        A sentence a bar.

    Raises:
        ValueError: If a system that the bars speak of was not measured at batch 1.
    """
    measured = {line.system: line for line in summaries if line.batch_size == 1}
    if missing := {"plain", "layerskip", "draft_model"} - measured.keys():
        raise ValueError(
            f"--check compares plain, layerskip and draft_model at batch 1, but "
            f"{', '.join(sorted(missing))} was not measured there; leave --systems and "
            "--batch-sizes at their defaults."
        )
    ours, draft_model = measured["layerskip"], measured["draft_model"]
    missed = []
    if (ours.share_of_bound or 0.0) < MIN_SHARE_OF_BOUND:
        missed.append(f"{ours.share_of_bound or 0.0:.2f} of the bound; bar {MIN_SHARE_OF_BOUND}")
    if (ours.speedup or 0.0) < MIN_SPEEDUP:
        missed.append(f"{ours.speedup or 0.0:.2f} times plain vLLM; bar {MIN_SPEEDUP}")
    if ours.tokens_per_s <= draft_model.tokens_per_s:
        missed.append(
            f"{ours.tokens_per_s:.1f} tokens/s, not faster than draft_model with "
            f"{draft_model.tokens_per_s:.1f}"
        )
    return missed


def make_table(
    summaries: Sequence[Summary],
    engines: Mapping[str, Facts],
    counts: WeightCounts,
    options: argparse.Namespace,
) -> Table:
    """Returns the table that is printed."""
    headings = (
        "batch",
        "system",
        "tokens/s",
        "(range)",
        "first token",
        "vs plain",
        "accepted",
        "bound",
        "of bound",
        "same as plain",
        "weights",
        "peak memory",
        "KV tokens",
    )
    table = Table(*headings[:2], title="Decoding speed")
    for heading in headings[2:]:
        table.add_column(heading, justify="right")
    bytes_per_weight = BYTES_PER_WEIGHT[options.dtype]
    draft_weights = counts.read_by_draft(options.exit_layer) + counts.embedding
    for line in summaries:
        weights = counts.total + (draft_weights if line.system == "draft_model" else 0)
        facts = engines[line.system]
        accepted = _show(line.acceptance, ".0%")
        if line.accepted is not None:
            accepted += f" ({line.accepted:.2f}/{options.num_speculative_tokens})"
        table.add_row(
            str(line.batch_size),
            line.system,
            f"{line.tokens_per_s:.1f}",
            f"{line.slowest:.1f}-{line.fastest:.1f}",
            f"{line.prefill_s * 1e3:.0f} ms",
            _show(line.speedup, ".2f"),
            accepted,
            _show(line.bound, ".2f"),
            _show(line.share_of_bound, ".0%"),
            f"{_show(line.same_texts, '.0%')} ({_show(line.same_tokens, '.0%')})",
            f"{weights * bytes_per_weight / 2**30:.2f} GiB",
            f"{facts.peak_memory_bytes / 2**30:.2f} GiB",
            f"{facts.num_kv_tokens:,}",
            end_section=line.system == options.systems[-1],
        )
    return table


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def describe_run(
    checkpoint: SyntheticCheckpoint,
    counts: WeightCounts,
    engines: Mapping[str, Facts],
    summaries: Sequence[Summary],
    options: argparse.Namespace,
) -> list[str]:
    """Returns the lines above the table: machine, versions, model and what the bound is."""
    facts = next(iter(engines.values()))
    size = BYTES_PER_WEIGHT[options.dtype]
    prefix = options.exit_layer * counts.layer / counts.whole
    head = counts.head / counts.whole
    num_tokens = options.num_speculative_tokens
    lines = [
        f"{describe_hardware()}; {facts.num_threads} threads; vLLM {version('vllm')}, "
        f"PyTorch {version('torch')}; {facts.mode}, "
        + ("vLLM's engine process" if options.engine_process else "engine in its caller's process"),
        f"{options.preset}: {counts.total / 1e9:.2f} B weights, {options.dtype}; E = "
        f"{options.exit_layer} of {counts.num_layers} layers, K = {num_tokens}; late layers scaled "
        f"by {checkpoint.late_scale}; {checkpoint.distinct_ngrams:.0%} of a text's 4-grams differ",
        f"{options.repeats} rounds of {options.max_tokens} tokens after "
        f"{options.num_prompt_tokens} prompt tokens, systems in turn; "
        f"temperature {options.temperature:g}; prefill not counted",
        f"bound = (accepted + 1) / (K * (prefix + head) + whole) = (accepted + 1) / "
        f"({num_tokens} * ({prefix:.4f} + {head:.4f}) + 1), bytes read in shares of the whole",
    ]
    for line in summaries:
        if line.system == "plain" and line.batch_size == 1:
            rate = line.tokens_per_s * counts.whole * size / 1e9
            lines.append(f"plain at batch 1 reads {rate:.1f} GB/s of weights")
    return lines


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line.

    Args:
        arguments: The words after the command; the process's own when None.

    Returns:
        The options, with the defaults that hang on the machine filled in.

    Raises:
        ValueError: If a number is out of range. The message names the field and its value.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speedup", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="default: cpu-0.6b, on a GPU gpu-1b"
    )
    parser.add_argument("--exit-layer", type=int, help="E (default: a quarter of the layers)")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, metavar="K")
    parser.add_argument("--acceptance", type=float, default=0.72, help="of the checkpoint to make")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each system")
    parser.add_argument("--num-prompt-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens a text")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", choices=sorted(BYTES_PER_WEIGHT), default="bfloat16")
    parser.add_argument(
        "--enforce-eager", action="store_true", help="no torch.compile, no CUDA graphs"
    )
    parser.add_argument("--engine-process", action="store_true", help="as `LLM` runs by default")
    parser.add_argument("--kv-cache-gib", type=float, default=0.5, help="for each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed at batch 1")
    options = parser.parse_args(arguments)
    options.preset = options.preset or ("gpu-1b" if list_gpu_names() else "cpu-0.6b")
    if options.exit_layer is None:
        options.exit_layer = PRESETS[options.preset].exit_layer
    for name, least in _LEAST.items():
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {getattr(options, name)}; it must be at least {least}.")
    if min(options.batch_sizes) < 1:
        raise ValueError(f"--batch-sizes has {min(options.batch_sizes)}; all must be at least 1.")
    if options.num_prompt_tokens + options.max_tokens + MARGIN_TOKENS > MAX_POSITIONS:
        raise ValueError(
            f"--num-prompt-tokens and --max-tokens are {options.num_prompt_tokens} and "
            f"{options.max_tokens}; together they must be at most {MAX_POSITIONS - MARGIN_TOKENS}."
        )
    if options.check and (1 not in options.batch_sizes or "plain" not in options.systems):
        raise ValueError(
            "--check needs batch size 1 and the systems plain, layerskip, draft_model."
        )
    return options


def prepare_checkpoint(options: argparse.Namespace) -> tuple[SyntheticSpec, SyntheticCheckpoint]:
    """Makes the checkpoint in a process of its own, so that no engine shares its memory."""
    spec = dataclasses.replace(
        PRESETS[options.preset],
        exit_layer=options.exit_layer,
        num_speculative_tokens=options.num_speculative_tokens,
        acceptance=options.acceptance,
        seed=options.seed,
    )
    command = [sys.executable, "-m", "benchmarks.synthetic_checkpoint"]
    for name in ("preset", "exit_layer", "num_speculative_tokens", "acceptance", "seed"):
        command += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    command += ["--folder", str(options.checkpoints)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return spec, read_checkpoint(options.checkpoints / spec.name())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and returns the exit status."""
    options = parse_options(arguments)
    if not list_gpu_names():
        # vLLM would leave one thread to an engine in its caller's process. Set before any starts.
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    spec, checkpoint = prepare_checkpoint(options)
    counts = count_weights(json.loads((checkpoint.folder / "config.json").read_text()))
    with run_engines(options, checkpoint) as engines:
        results = measure(engines, options, spec.vocab_size)
        facts = {engine.system: engine.facts for engine in engines}
    summaries = summarize(results, counts, options)
    notes = describe_run(checkpoint, counts, facts, summaries, options)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print(make_table(summaries, facts, counts, options))
    if options.output:
        write_json(options.output, notes, facts, results, summaries)
    missed = find_missed_bars(summaries) if options.check else []
    for words in missed:
        console.print(f"missed at batch 1: {words}", style="red")
    return 1 if missed else 0


def write_json(
    path: Path,
    notes: Sequence[str],
    engines: Mapping[str, Facts],
    results: Mapping[int, Mapping[str, Sequence[Measurement]]],
    summaries: Sequence[Summary],
) -> None:
    """Writes the conditions, the lines of the table and every round, without its tokens."""
    rounds = [
        {"batch_size": batch_size, "system": system, "repeat": repeat}
        | {name: value for name, value in vars(each).items() if name != "tokens"}
        for batch_size, by_system in results.items()
        for system, measurements in by_system.items()
        for repeat, each in enumerate(measurements)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "conditions": notes,
        "engines": {system: dataclasses.asdict(facts) for system, facts in engines.items()},
        "summary": [dataclasses.asdict(line) for line in summaries],
        "rounds": rounds,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
