"""What copied drafts gain where text repeats itself, and cost where it does not.

    python -m benchmarks.decoding.lookup

With the embedded checkpoint: held-out code, code whose beginning stands at the prompt's end again,
and code sampled at temperature 1, which has no order and repeats nothing. One engine (Model Runner
V1) takes turns with `lookup` on and off, so that the machine's moods hit both alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.decoding.engines import Engine, Measurement, run_engines
from benchmarks.decoding.speedup_report import BYTES_PER_WEIGHT
from layerskip_vllm.tools.hardware import describe_hardware
from layerskip_vllm.tools.output import make_console, write_json
from layerskip_vllm.tools.prompts import cut_prompts
from layerskip_vllm.tools.stdlib_corpus import held_out_files

MODEL = "checkpoints/stdlib-24l"
MAX_MODEL_LEN = 1024
OUTPUT_FOLDER = Path("benchmark-output/lookup")
LOOKUPS = ("off", "auto")
# By kind of text: tokens of code in the prompt, how many of its first stand at its end again, and
# the temperature.
KINDS: Mapping[str, tuple[int, int, float]] = {
    "code": (64, 0, 0.0),
    "code after its beginning again": (400, 60, 0.0),
    "sampled code": (64, 0, 1.0),
}


# --- In the engine's process ----------------------------------------------------------------------


def use_lookup(lookup: str) -> None:
    """Have the loaded engine copy drafts, or not."""
    from benchmarks.decoding import engines

    core: Any = engines._llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    runner.drafter.speculative_config.lookup = lookup


# --- In the parent --------------------------------------------------------------------------------


def main() -> None:
    """Measure, and print the table."""
    options = parse_args()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    lines = []
    with run_engines({"lookup": _engine_args(options)}, options.output) as (engine,):
        for kind in options.kinds:
            prompts = cut_prompts_of_kind(kind, max(options.batch_sizes) * options.repeats)
            for batch_size in options.batch_sizes:
                rounds = _run_turns(engine, options, prompts, batch_size, KINDS[kind][2])
                lines.append(_summarize(kind, batch_size, rounds))
                write_json(options.output / "lookup.json", lines)
    console = make_console()
    console.print(describe_hardware())
    console.print(f"{MODEL}, {options.dtype}, {options.max_tokens} tokens a text")
    console.print(make_lookup_table(lines))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=9, help="rounds with and without lookup")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens a text")
    parser.add_argument("--dtype", choices=sorted(BYTES_PER_WEIGHT), default="float32")
    parser.add_argument("--enforce-eager", action="store_true", help="start in seconds")
    parser.add_argument("--output", type=Path, default=OUTPUT_FOLDER)
    return parser.parse_args()


def cut_prompts_of_kind(kind: str, num_prompts: int) -> list[list[int]]:
    """Cut prompts of a kind from held-out code."""
    from transformers import AutoTokenizer

    num_tokens, num_again, _ = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = cut_prompts([file.text for file in held_out_files()], num_prompts, num_tokens)
    cut = [tokenizer.encode(text)[:num_tokens] for text in texts]
    return [prompt + prompt[:num_again] for prompt in cut]


def _engine_args(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `LLM` gets."""
    return {
        "model": MODEL,
        "dtype": options.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max(options.batch_sizes),
        "kv_cache_memory_bytes": 1 << 28,
        "enable_prefix_caching": False,
        "enforce_eager": options.enforce_eager,
        "disable_log_stats": False,
        "speculative_config": {"method": "layerskip", "lookup": "auto"},
    }


def _run_turns(
    engine: Engine,
    options: argparse.Namespace,
    prompts: Sequence[list[int]],
    batch_size: int,
    temperature: float,
) -> dict[str, list[Measurement]]:
    """Decode batch after batch, each without lookup and with."""
    rounds: dict[str, list[Measurement]] = {lookup: [] for lookup in LOOKUPS}
    engine.run_round(list(prompts[:batch_size]), 16, temperature)
    for batch in _batches(prompts, batch_size, options.repeats):
        for lookup in LOOKUPS:
            engine.call(f"{__spec__.name}:use_lookup", lookup)
            rounds[lookup].append(engine.run_round(batch, options.max_tokens, temperature))
    return rounds


def _batches(
    prompts: Sequence[list[int]], batch_size: int, num_batches: int
) -> Iterator[list[list[int]]]:
    for index in range(num_batches):
        yield list(prompts[index * batch_size : (index + 1) * batch_size])


def _summarize(
    kind: str, batch_size: int, rounds: Mapping[str, Sequence[Measurement]]
) -> dict[str, Any]:
    line: dict[str, Any] = {"kind": kind, "batch_size": batch_size}
    for lookup, measurements in rounds.items():
        counters = [measurement.counters for measurement in measurements]
        num_draft_tokens = sum(each.num_draft_tokens for each in counters)
        line[lookup] = {
            "acceptance": sum(each.num_accepted_tokens for each in counters) / num_draft_tokens,
            "tokens_per_s": statistics.median(m.tokens_per_s for m in measurements),
        }
    turns = [(m.tokens_per_s, o.tokens_per_s) for m, o in zip(*_pair(rounds), strict=True)]
    line["speedup"] = statistics.median(auto / off for auto, off in turns)
    cpu_s = {lookup: sum(m.cpu_s for m in measured) for lookup, measured in rounds.items()}
    line["cpu_speedup"] = cpu_s["off"] / cpu_s["auto"]
    line["is_same_text"] = all(m.tokens == o.tokens for m, o in zip(*_pair(rounds), strict=True))
    return line


def _pair(
    rounds: Mapping[str, Sequence[Measurement]],
) -> tuple[Sequence[Measurement], Sequence[Measurement]]:
    return rounds["auto"], rounds["off"]


def make_lookup_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Lay the lines out."""
    table = Table(title="`lookup` auto beside off")
    table.add_column("text")
    for heading in (
        "batch",
        "accepted off",
        "accepted auto",
        "tokens/s off",
        "tokens/s auto",
        "times",
        "by CPU time",
        "same text",
    ):
        table.add_column(heading, justify="right")
    for line in lines:
        off, auto = line["off"], line["auto"]
        table.add_row(
            line["kind"],
            str(line["batch_size"]),
            f"{off['acceptance']:.0%}",
            f"{auto['acceptance']:.0%}",
            f"{off['tokens_per_s']:.1f}",
            f"{auto['tokens_per_s']:.1f}",
            f"{line['speedup']:.2f}",
            f"{line['cpu_speedup']:.2f}",
            "yes" if line["is_same_text"] else "no",
        )
    return table


if __name__ == "__main__":
    main()
