"""The table and the JSON of `benchmarks.decoding.speedup`, and the lines above the table."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from rich.table import Table

from benchmarks.decoding.engines import Facts, Measurement
from benchmarks.decoding.speedup_summary import Load, Summary
from benchmarks.decoding.synthetic_checkpoint import SyntheticCheckpoint
from benchmarks.decoding.weight_counts import WeightCounts
from layerskip_vllm.tools.hardware import describe_hardware

BYTES_PER_WEIGHT = {"bfloat16": 2, "float16": 2, "float32": 4}


def make_speedup_table(summaries: Sequence[Summary], options: argparse.Namespace) -> Table:
    """Return the table of speeds that is printed."""
    headings = (
        "batch",
        "prompt",
        "system",
        "tokens/s",
        "(range)",
        "first token",
        "vs plain",
        "accepted",
        "bound",
        "of bound",
        "same as plain",
        "target",
        "drafts",
    )
    table = _make_table("Decoding speed", headings, num_left=3)
    for line in summaries:
        accepted = _show(line.acceptance, ".0%")
        if line.accepted is not None:
            accepted += f" ({line.accepted:.2f}/{line.drafted:.3g})"
        table.add_row(
            str(line.load.batch_size),
            f"{line.load.num_prompt_tokens:,}",
            line.system,
            f"{line.tokens_per_s:.1f}",
            f"{line.slowest:.1f}-{line.fastest:.1f}",
            f"{line.prefill_s * 1e3:.0f} ms",
            _show(line.speedup, ".2f"),
            accepted,
            _show(line.bound, ".2f"),
            _show(line.share_of_bound, ".0%"),
            f"{_show(line.same_texts, '.0%')} ({_show(line.same_tokens, '.0%')})",
            _show(line.step_times.forward_ms if line.step_times else None, ".2f", " ms"),
            _show(line.step_times.drafter_ms if line.step_times else None, ".2f", " ms"),
            end_section=line.system == options.systems[-1],
        )
    return table


def make_engine_table(
    engines: Mapping[str, Facts], counts: WeightCounts, options: argparse.Namespace
) -> Table:
    """Return the table of what the engines take."""
    headings = (
        "system",
        "weights",
        "peak memory",
        "KV tokens",
        "start",
        "of it graphs",
        "graphs",
    )
    table = _make_table("Engines", headings, num_left=1)
    draft_weights = counts.read_by_draft(options.exit_layer) + counts.embedding
    for system, facts in engines.items():
        weights = counts.total + (draft_weights if system == "draft_model" else 0)
        table.add_row(
            system,
            f"{weights * BYTES_PER_WEIGHT[options.dtype] / 2**30:.2f} GiB",
            f"{facts.peak_memory_bytes / 2**30:.2f} GiB",
            f"{facts.num_kv_tokens:,}",
            f"{facts.start_s:.0f} s",
            _show(facts.capture_s, ".0f", " s"),
            _show(facts.graph_gib, ".2f", " GiB"),
        )
    return table


def _make_table(title: str, headings: Sequence[str], num_left: int) -> Table:
    table = Table(*headings[:num_left], title=title)
    for heading in headings[num_left:]:
        table.add_column(heading, justify="right")
    return table


def _show(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit


def describe_run(
    checkpoint: SyntheticCheckpoint,
    counts: WeightCounts,
    engines: Mapping[str, Facts],
    summaries: Sequence[Summary],
    options: argparse.Namespace,
) -> list[str]:
    """Return the lines above the table: machine, versions, model and what the bound is."""
    facts = next(iter(engines.values()))
    size = BYTES_PER_WEIGHT[options.dtype]
    shares = counts.shares(options.exit_layer)
    num_tokens = options.num_speculative_tokens
    lines = [
        f"{describe_hardware()}; {facts.num_threads} threads; vLLM {version('vllm')}, "
        f"PyTorch {version('torch')}; {facts.mode}, "
        + ("vLLM's engine process" if options.engine_process else "engine in its caller's process"),
        f"{options.model or options.preset}: {counts.total / 1e9:.2f} B weights, {options.dtype}; "
        f"E = {options.exit_layer} of {counts.num_layers} layers, K = {num_tokens}; "
        + _describe_weights(checkpoint, options),
        f"{options.repeats} rounds of {options.max_tokens} tokens after "
        f"{options.num_prompt_tokens} prompt tokens, systems in turn; "
        f"temperature {options.temperature:g}; prefill not counted",
        f"bound = (accepted + 1) / (K * (layers + head) + whole) = (accepted + 1) / "
        f"({num_tokens} * ({shares.layers:.4f} + {shares.head:.4f}) + 1), bytes read in "
        "shares of the whole",
    ]
    for line in summaries:
        if line.system == "plain" and line.load.batch_size == 1:
            rate = line.tokens_per_s * counts.whole * size / 1e9
            prompt = f"{line.load.num_prompt_tokens:,} prompt tokens"
            lines.append(f"plain at batch 1 with {prompt} reads {rate:.1f} GB/s of weights")
    return lines


def _describe_weights(checkpoint: SyntheticCheckpoint, options: argparse.Namespace) -> str:
    if checkpoint.late_scale is not None:
        differ = f"{checkpoint.distinct_ngrams:.0%} of a text's 4-grams differ"
        return f"late layers scaled by {checkpoint.late_scale}; {differ}"
    if options.model:
        return "trained; prompts are held-out code"
    acceptance = "as it comes"
    if options.is_acceptance_given:
        acceptance = f"given ({options.acceptance:.0%}), so that no text is plain's"
    return f"weights drawn by vLLM, acceptance {acceptance}"


def speedups_to_json(
    notes: Sequence[str],
    engines: Mapping[str, Facts],
    results: Mapping[Load, Mapping[str, Sequence[Measurement]]],
    summaries: Sequence[Summary],
) -> dict[str, Any]:
    """Return the conditions, the lines of the table and every round, without its tokens."""
    rounds = [
        {"load": dataclasses.asdict(load), "system": system, "repeat": repeat}
        | {name: value for name, value in dataclasses.asdict(each).items() if name != "tokens"}
        for load, by_system in results.items()
        for system, measurements in by_system.items()
        for repeat, each in enumerate(measurements)
    ]
    return {
        "conditions": notes,
        "engines": {system: dataclasses.asdict(facts) for system, facts in engines.items()},
        "summary": [dataclasses.asdict(line) for line in summaries],
        "rounds": rounds,
    }
