"""Compares training recipes on the embedded checkpoint's model, text, seeds and steps.

    python -m benchmarks.training.recipes

Each variant is trained, measured exit by exit on held-out text, and served by vLLM to count
accepted drafts. The adapter is trained on the frozen model of the variant without a recipe. A
variant whose checkpoint is there already is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.decoding.engines import COUNTING_ENGINE, run_engines
from checkpoints.stdlib.small_model import encode_files
from layerskip_vllm.checkpoint.exit_adapter import load_exit_adapter
from layerskip_vllm.tools import stdlib_corpus
from layerskip_vllm.tools.commands import main as run_command
from layerskip_vllm.tools.hardware import describe_hardware
from layerskip_vllm.tools.prompts import held_out_prompts
from layerskip_vllm.training.exit_evaluation import measure_held_out
from layerskip_vllm.training.exit_head import ExitHead

PLAIN, ADAPTER = "none", "frozen adapter"
# Options of `checkpoints.stdlib.pretrain`.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    PLAIN: ("--no-recipe",),
    "layer dropout": ("--e-scale", "0", "--num-distill-steps", "0"),
    "exit loss": ("--max-drop-prob", "0", "--num-distill-steps", "0"),
    "both": ("--num-distill-steps", "0"),
    "both, then E = 6 learns the last layer's predictions": (),
}
NUM_LAYERS, NUM_SPECULATIVE_TOKENS = 24, 4
EXIT_LAYERS = (NUM_LAYERS // 4, NUM_LAYERS // 2)
SEQ_LEN, NUM_SEQUENCES = 512, 64
NUM_PROMPTS, MAX_TOKENS = 32, 128


@dataclass(frozen=True)
class RecipeResult:
    """What a variant has become, on held-out text."""

    variant: str
    last_loss: float  # the last layer's, in nats per token
    agreements: Mapping[int, float]  # by E, as `HeldOutExits` has them
    acceptance: float  # accepted by drafted tokens in vLLM, greedy, with E = L / 4


def train_variant(variant: str, folder: Path, num_steps: int) -> None:
    """Train a variant, in the proportions of the embedded checkpoint's run."""
    share = num_steps / 2000
    lengths = {
        "--num-steps": num_steps,
        "--num-growth-steps": round(500 * share),
        "--num-decay-steps": round(800 * share),
        "--num-long-steps": round(40 * share),
        "--num-distill-steps": round(700 * share),
    }
    options = [str(part) for option in lengths.items() for part in option]
    module = "checkpoints.stdlib.pretrain"
    subprocess.run(
        [sys.executable, "-m", module, "--out", str(folder), *options, *VARIANTS[variant]],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def train_adapter(model: Path, folder: Path, num_steps: int) -> None:
    """Train an adapter of rank 64 for E = L / 4 of a frozen model, on the same text."""
    corpus = folder.with_suffix(".jsonl")
    with corpus.open("w", encoding="utf-8") as lines:
        for file in stdlib_corpus.train_files():
            lines.write(json.dumps({"text": file.text}) + "\n")
    config = {
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(corpus)}], "seq_len": 256},
        "exit_adapter": {"rank": 64, "exit_layer": EXIT_LAYERS[0]},
        "sequences_per_step": 8,
        "training": {
            "output_dir": str(folder),
            "max_steps": num_steps,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": 8,
            "logging_steps": 50,
            "use_cpu": not torch.cuda.is_available(),
        },
    }
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(json.dumps(config, indent=2))  # JSON is YAML
    if run_command(["train", str(recipe)]) != 0:
        raise RuntimeError(f"`layerskip-vllm train {recipe}` failed; see above.")


@torch.inference_mode()
def measure_agreements(model_folder: Path) -> tuple[float, dict[int, float]]:
    """Return the last layer's held-out loss, and by E the exits' agreement with it."""
    model, sequences = _load(model_folder)
    held_out = measure_held_out(model, sequences)
    return held_out.losses[-1], {e: held_out.agreements[e - 1] for e in EXIT_LAYERS}


@torch.inference_mode()
def measure_adapter(model_folder: Path, adapter_folder: Path) -> float:
    """Return the adapted exit's agreement with the last layer on held-out text."""
    model, sequences = _load(model_folder)
    head, adapter = ExitHead(model), load_exit_adapter(adapter_folder)
    parts = head.parts
    adapted = dataclasses.replace(parts, norm=torch.nn.Sequential(parts.norm, adapter))
    num_agreed = 0
    for rows in torch.split(sequences, 8):
        outputs = head.run_layers(rows[:, :-1])
        chosen = adapted.compute_logits(outputs[adapter.config.exit_layer - 1]).argmax(-1)
        last = parts.compute_logits(outputs[len(parts.layers) - 1]).argmax(-1)
        num_agreed += int((chosen == last).sum())
    return num_agreed / sequences[:, 1:].numel()


def _load(folder: Path) -> tuple[Any, torch.Tensor]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    token_ids = encode_files(tokenizer, stdlib_corpus.held_out_files())
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    return model, token_ids.unfold(0, SEQ_LEN + 1, SEQ_LEN)[:NUM_SEQUENCES]


def count_accepted(model: Path, log_folder: Path, **speculative_config: Any) -> float:
    """Return accepted by drafted tokens over held-out prompts, with a vLLM engine in float32."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = held_out_prompts(NUM_PROMPTS)
    arguments = {
        **COUNTING_ENGINE,
        "model": str(model),
        "speculative_config": {
            "method": "layerskip",
            "exit_layer": EXIT_LAYERS[0],
            "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
            **speculative_config,
        },
    }
    prompts = [tokenizer.encode(text) for text in texts]
    with run_engines({"layerskip": arguments}, log_folder) as (engine,):
        return engine.run_round(prompts, MAX_TOKENS, temperature=0.0).counters.acceptance_rate


def compare_recipes(folder: Path, num_steps: int) -> list[RecipeResult]:
    """Train what is not there and measure all."""
    results = []
    for variant in VARIANTS:
        model = folder / variant.partition(",")[0].replace(" ", "-")
        if "," in variant:
            model = model.with_name(model.name + "-distilled")
        if not (model / "training.json").exists():
            train_variant(variant, model, num_steps)
        last_loss, agreements = measure_agreements(model)
        results.append(RecipeResult(variant, last_loss, agreements, count_accepted(model, folder)))
    model, adapter = folder / PLAIN, folder / "adapter"
    if not (adapter / "exit_adapter.json").exists():
        train_adapter(model, adapter, num_steps)
    agreements = {**results[0].agreements, EXIT_LAYERS[0]: measure_adapter(model, adapter)}
    acceptance = count_accepted(model, folder, exit_adapter=str(adapter))
    return [*results, RecipeResult(ADAPTER, results[0].last_loss, agreements, acceptance)]


def make_recipe_table(results: Sequence[RecipeResult]) -> Table:
    """Return the table that is printed."""
    table = Table("recipe", title="What each part of the recipe does")
    for heading in (
        "last layer's loss",
        *(f"agrees at E = {exit_layer}" for exit_layer in EXIT_LAYERS),
        f"accepted at E = {EXIT_LAYERS[0]}, K = {NUM_SPECULATIVE_TOKENS}",
    ):
        table.add_column(heading, justify="right")
    for result in results:
        shares = (*result.agreements.values(), result.acceptance)
        table.add_row(
            result.variant, f"{result.last_loss:.3f}", *(f"{share:.0%}" for share in shares)
        )
    return table


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-steps", type=int, default=800, help="optimizer steps of each")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-output/recipes"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = compare_recipes(options.folder, options.num_steps)
    console = Console()
    console.print(describe_hardware(), f"{options.num_steps} steps of 2048 tokens each")
    console.print(make_recipe_table(results))
    report = {
        "hardware": describe_hardware(),
        "num_steps": options.num_steps,
        "results": [dataclasses.asdict(result) for result in results],
    }
    (options.folder / "recipes.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
