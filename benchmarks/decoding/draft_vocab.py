"""What a smaller draft head gains: one engine, whose drafts choose among fewer and fewer tokens.

    python -m benchmarks.decoding.draft_vocab

The heads take turns on one engine (Model Runner V1, whose CUDA graphs end before the head), so that
a model of any size is loaded once and the machine's moods hit all alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.decoding.engines import Measurement, run_engines
from benchmarks.decoding.speedup import NUM_WARM_UP_TOKENS, prepare_checkpoint
from benchmarks.decoding.speedup_report import BYTES_PER_WEIGHT
from benchmarks.decoding.synthetic_checkpoint import DEFAULT_FOLDER
from benchmarks.decoding.synthetic_spec import PRESETS, make_prompts
from benchmarks.decoding.systems import MARGIN_TOKENS
from benchmarks.decoding.weight_counts import count_weights
from layerskip_vllm.checkpoint.draft_vocab import DraftVocab, save_draft_vocab
from layerskip_vllm.tools.hardware import describe_hardware
from layerskip_vllm.tools.output import make_console, write_json
from layerskip_vllm.tools.speedup_bound import bound_speedup

OUTPUT_FOLDER = Path("benchmark-output/draft-vocab")


@dataclass(frozen=True)
class HeadSize:
    """A draft vocabulary's size, and the share of the text that it covers, both 0 to 1."""

    size: float
    coverage: float

    @classmethod
    def parse(cls, words: str) -> HeadSize:
        """Read percentages such as "12.5:96"."""
        size, _, coverage = words.partition(":")
        return cls(float(size) / 100, float(coverage) / 100)

    def choose_tokens(self, text: Sequence[int], vocab_size: int, seed: int) -> list[int]:
        """Choose tokens that are `coverage` of a text, and others that it has not, to the size.

        `ValueError` if the text has more kinds of tokens than that.
        """
        import random

        source = random.Random(seed)
        kinds = sorted(set(text))
        source.shuffle(kinds)
        num_left_out = (1 - self.coverage) * len(text)
        left_out: set[int] = set()
        while sum(token_id in left_out for token_id in text) < num_left_out:
            left_out.add(kinds.pop())
        num_tokens = round(self.size * vocab_size)
        others = sorted(set(range(vocab_size)) - set(kinds) - left_out)
        if not len(kinds) <= num_tokens <= len(kinds) + len(others):
            raise ValueError(
                f"--heads has {100 * self.size:g}:{100 * self.coverage:g}, {num_tokens} of "
                f"{vocab_size} tokens, but the texts have {len(kinds)} to cover and "
                f"{len(left_out)} to leave out; take another size, or fewer texts."
            )
        return kinds + source.sample(others, num_tokens - len(kinds))


# --- In the engine's process ----------------------------------------------------------------------


def use_draft_vocab(file: str | None) -> int:
    """Have the loaded engine draft with a file's tokens, or all: a step's head in bytes."""
    from benchmarks.decoding import engines
    from layerskip_vllm.drafting.bytes_read import num_bytes
    from layerskip_vllm.drafting.draft_head import DraftHead

    core: Any = engines._llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    model = runner.drafter.model
    if file not in _heads:
        _heads[file] = DraftHead(model.target, file, runner.vllm_config) if file else None
    head = model.draft_head = _heads[file]
    return num_bytes(model.target.lm_head if head is None else head.head)


_heads: dict[str | None, Any] = {}

# --- In the parent --------------------------------------------------------------------------------


def main() -> None:
    """Measure, and print the table."""
    options = parse_args()
    checkpoint = prepare_checkpoint(options)
    counts, vocab_size = count_weights(checkpoint.config), checkpoint.config["vocab_size"]
    num_prompts = max(options.batch_sizes) * options.repeats
    prompts = make_prompts(vocab_size, num_prompts, options.num_prompt_tokens, options.seed)
    results: dict[int, dict[HeadSize, list[Measurement]]] = {}
    head_bytes: dict[HeadSize, int] = {}
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    engine_args = _engine_args(options, str(checkpoint.folder.resolve()))
    with run_engines({"draft-vocab": engine_args}, options.output) as (engine,):
        # The texts are the same for every head, as they are the target's.
        largest = max(options.batch_sizes)
        texts = [
            text
            for start in range(0, num_prompts, largest)
            for text in engine.run_round(
                prompts[start : start + largest], options.max_tokens, 0.0
            ).tokens
        ]
        files = _write_draft_vocabs(options, texts, vocab_size)
        for batch_size in options.batch_sizes:
            by_head = results.setdefault(batch_size, {head: [] for head in files})
            for head, file in files.items():
                head_bytes[head] = engine.call(f"{__spec__.name}:use_draft_vocab", file)
                engine.run_round(prompts[:batch_size], NUM_WARM_UP_TOKENS, 0.0)
            for repeat in range(options.repeats):
                batch = prompts[repeat * batch_size : (repeat + 1) * batch_size]
                for head, file in files.items():
                    engine.call(f"{__spec__.name}:use_draft_vocab", file)
                    by_head[head].append(engine.run_round(batch, options.max_tokens, 0.0))
    lines = [
        line
        for batch_size, by_head in results.items()
        for line in _summarize(batch_size, by_head, head_bytes, counts.shares(options.exit_layer))
    ]
    console = make_console()
    console.print(describe_hardware())
    console.print(f"{checkpoint.folder.name}, {options.dtype}, exit {options.exit_layer}, greedy")
    console.print(make_head_table(lines))
    write_json(options.output / "draft_vocab_speed.json", lines)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="gpu-1b")
    parser.add_argument("--exit-layer", type=int, help="E (default: a quarter of the layers)")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, metavar="K")
    parser.add_argument("--acceptance", type=float, default=0.72, help="of the checkpoint to make")
    parser.add_argument(
        "--heads",
        type=HeadSize.parse,
        nargs="+",
        metavar="SIZE:COVERAGE",
        default=[HeadSize.parse(w) for w in ("100:100", "50:99", "25:98", "12.5:96", "6.25:92")],
        help="percent of the vocabulary, and of the text that is to be among it; `layerskip-vllm "
        "draft-vocab` measures the second for a tokenizer and a text",
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each head")
    parser.add_argument("--num-prompt-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens a text")
    parser.add_argument("--dtype", choices=sorted(BYTES_PER_WEIGHT), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--output", type=Path, default=OUTPUT_FOLDER)
    parser.set_defaults(
        model=None, dummy_weights=False
    )  # drafts that are accepted need a model that says so
    options = parser.parse_args()
    if options.exit_layer is None:
        options.exit_layer = PRESETS[options.preset].exit_layer
    return options


def _engine_args(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Return what `LLM` gets."""
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "max_model_len": options.num_prompt_tokens + options.max_tokens + MARGIN_TOKENS,
        "max_num_seqs": max(options.batch_sizes),
        "kv_cache_memory_bytes": 1 << 28,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "speculative_config": {
            "method": "layerskip",
            "exit_layer": options.exit_layer,
            "num_speculative_tokens": options.num_speculative_tokens,
        },
    }


def _write_draft_vocabs(
    options: argparse.Namespace, texts: Sequence[Sequence[int]], vocab_size: int
) -> dict[HeadSize, str | None]:
    """Write a file for each size; the whole vocabulary is the model's own head, and has none."""
    text = [token_id for tokens in texts for token_id in tokens]
    files: dict[HeadSize, str | None] = {}
    for head in options.heads:
        if head.size == 1:
            files[head] = None
            continue
        token_ids = head.choose_tokens(text, vocab_size, options.seed)
        file = (options.output / f"{100 * head.size:g}-percent.json").resolve()
        save_draft_vocab(file, DraftVocab(vocab_size=vocab_size, token_ids=tuple(token_ids)))
        files[head] = str(file)
    return files


def _summarize(
    batch_size: int,
    by_head: Mapping[HeadSize, Sequence[Measurement]],
    head_bytes: Mapping[HeadSize, int],
    shares: Any,
) -> Iterator[dict[str, Any]]:
    """Make a line of each head, beside the first of them."""
    (first, baseline), *_ = by_head.items()
    first_bound = 0.0
    for head, measurements in by_head.items():
        counters = [measurement.counters for measurement in measurements]
        num_drafts = sum(each.num_drafts for each in counters)
        num_accepted = sum(each.num_accepted_tokens for each in counters)
        num_draft_tokens = sum(each.num_draft_tokens for each in counters)
        read = shares.with_draft_vocab(head_bytes[head] / head_bytes[first]).total
        bound = bound_speedup(read, num_draft_tokens / num_drafts, num_accepted / num_drafts)
        first_bound = first_bound or bound
        turns = zip(measurements, baseline, strict=True)
        yield {
            "batch_size": batch_size,
            "size": head.size,
            "coverage": head.coverage,
            "head_bytes": head_bytes[head],
            "draft_step_share": read,
            "acceptance": num_accepted / num_draft_tokens,
            "tokens_per_s": statistics.median(m.tokens_per_s for m in measurements),
            "speedup": statistics.median(m.tokens_per_s / other.tokens_per_s for m, other in turns),
            "speedup_by_bytes": bound / first_bound,
            "is_same_text": all(
                m.tokens == b.tokens for m, b in zip(measurements, baseline, strict=True)
            ),
        }


def make_head_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Lay the lines out."""
    table = Table(title="Drafts that choose among fewer tokens; times the first line of a batch")
    for heading in (
        "batch",
        "tokens",
        "of the text",
        "head",
        "draft step reads",
        "accepted",
        "tokens/s",
        "times",
        "by bytes",
        "same text",
    ):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            str(line["batch_size"]),
            f"{100 * line['size']:g} %",
            f"{100 * line['coverage']:g} %",
            f"{line['head_bytes'] / 2**20:.1f} MiB",
            f"{100 * line['draft_step_share']:.1f} %",
            f"{100 * line['acceptance']:.0f} %",
            f"{line['tokens_per_s']:.2f}",
            f"{line['speedup']:.2f}",
            f"{line['speedup_by_bytes']:.2f}",
            "yes" if line["is_same_text"] else "no",
        )
    return table


if __name__ == "__main__":
    main()
