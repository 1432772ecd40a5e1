"""Measures K "auto" beside plain vLLM and beside each fixed K, in turns, for good or bad drafts.

Two engines take turns: plain vLLM and one with K "auto". A fixed K is the same engine, whose
requests ask for it and which chooses nothing meanwhile; what "auto" has learned it keeps.

Counted is from the first token of all requests until one of them ends: a server's batch is filled
up again, while what is left of one that is not gets smaller and smaller, the more so the more a
text's drafts differ from another's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.decoding import engines
from benchmarks.decoding.engines import Engine, run_engines
from benchmarks.decoding.speedup import (
    LOG_FOLDER,
    draw_prompts,
    parse_options,
    prepare_checkpoint,
)
from benchmarks.decoding.systems import find_loads, make_engine_args
from layerskip_vllm.tools.hardware import describe_hardware
from layerskip_vllm.tools.output import make_console, write_json
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters

PLAIN, AUTO = "plain", "auto"
LENGTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class FullBatch:
    """What a full batch did: tokens a second, and what was drafted and accepted."""

    tokens_per_s: float
    counters: SpecDecodeCounters


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and return the exit status."""
    options = parse_options(arguments)
    checkpoint = prepare_checkpoint(options)
    auto = make_engine_args("layerskip", options, checkpoint)
    auto["speculative_config"]["num_speculative_tokens"] = f"auto:{max(LENGTHS)}"
    all_args = {PLAIN: make_engine_args(PLAIN, options, checkpoint), AUTO: auto}
    console = make_console()
    with run_engines(all_args, LOG_FOLDER) as (plain, drafting):
        model = options.model or options.preset
        console.print(f"{describe_hardware()}; {model}, {options.dtype}", soft_wrap=True)
        results: dict[int, dict[str, list[FullBatch]]] = {}
        for load in find_loads(options):
            prompts = draw_prompts(options, checkpoint, load)
            results[load.batch_size] = time_batch(plain, drafting, prompts, options)
            if options.output:
                rates = {size: to_rates(rounds) for size, rounds in results.items()}
                write_json(options.output, rates)
    console.print(make_table(results))
    return 0


def time_batch(
    plain: Engine,
    drafting: Engine,
    prompts: Sequence[list[int]],
    options: argparse.Namespace,
) -> dict[str, list[FullBatch]]:
    """Run the rounds of a batch size; the first of them, in which "auto" learns, is not counted."""
    names = [PLAIN, *map(str, LENGTHS), AUTO]
    rounds: dict[str, list[FullBatch]] = {name: [] for name in names}
    batch_size = len(prompts) // (options.repeats + 1)
    for repeat in range(options.repeats + 1):
        batch = list(prompts[repeat * batch_size : (repeat + 1) * batch_size])
        for name in names:
            engine = plain if name == PLAIN else drafting
            length = int(name) if name.isdecimal() else None
            job = "benchmarks.decoding.draft_length:run_length"
            measurement = engine.call(job, batch, options.max_tokens, length)
            if repeat > 0:
                rounds[name].append(measurement)
    return rounds


def run_length(prompts: list[list[int]], max_tokens: int, length: int | None) -> FullBatch:
    """Decode a batch in the engine's process until the first request ends.

    Args:
        prompts: Their tokens.
        max_tokens: The tokens of each request.
        length: A fixed K; None for none at all, or for what "auto" chooses.

    Returns:
        What was measured from the first token of all requests to the last step before that end.
    """
    from vllm import SamplingParams, TokensPrompt

    engine = engines._llm.llm_engine
    config: Any = engine.vllm_config.speculative_config
    if config is not None:
        config.is_length_auto = length is None
    extra_args = None if length is None else {"layerskip": {"num_speculative_tokens": length}}
    sampling = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra_args,
    )
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), sampling)
    num_tokens: dict[str, int] = {}
    marks: list[tuple[float, int, SpecDecodeCounters]] = []
    while True:
        outputs: list[Any] = engine.step()
        if any(output.finished for output in outputs):
            break
        num_tokens |= {each.request_id: len(each.outputs[0].token_ids) for each in outputs}
        if len(num_tokens) == len(prompts):
            total = sum(num_tokens.values())
            marks.append((time.perf_counter(), total, SpecDecodeCounters.read_own()))
    engine.abort_request(list(num_tokens))
    (start_s, before, first), *_, (end_s, after, last) = marks
    return FullBatch((after - before) / (end_s - start_s), last - first)


def to_rates(rounds: Mapping[str, Sequence[FullBatch]]) -> dict[str, list[float]]:
    """Return the tokens a second of each round, by what decoded."""
    return {name: [each.tokens_per_s for each in lines] for name, lines in rounds.items()}


def make_table(results: Mapping[int, Mapping[str, Sequence[FullBatch]]]) -> Table:
    """Return the table: medians of the ratios to plain's and the best fixed K's round of a turn."""
    headings = ("batch", "plain tokens/s", *(f"K = {k}" for k in LENGTHS), AUTO, "of best K")
    table = Table(*headings, "drafts", "accepted", title="times plain, by number of drafts")
    for size, rounds in results.items():
        rates = to_rates(rounds)
        ratios = {name: _median_ratio(each, rates[PLAIN]) for name, each in rates.items()}
        best = max(map(str, LENGTHS), key=ratios.__getitem__)
        counters = [each.counters for each in rounds[AUTO]]
        drafted = sum(each.num_draft_tokens for each in counters)
        accepted = sum(each.num_accepted_tokens for each in counters)
        table.add_row(
            str(size),
            f"{statistics.median(rates[PLAIN]):.1f}",
            *(f"{ratios[str(k)]:.2f}" for k in LENGTHS),
            f"{ratios[AUTO]:.2f}",
            f"{_median_ratio(rates[AUTO], rates[best]):.2f} ({best})",
            f"{drafted / max(1, sum(each.num_drafts for each in counters)):.1f}",
            f"{accepted / max(1, drafted):.0%}",
        )
    return table


def _median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
