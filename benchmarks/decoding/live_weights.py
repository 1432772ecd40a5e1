"""Drafts after the target's weights change in place, as in the rollouts of reinforcement learning.

    python -m benchmarks.decoding.live_weights

The embedded checkpoint is trained on for some steps to write in capitals, and its weights are then
loaded into engines that run the old ones: layerskip, and vLLM's `draft_model` with the old first
layers as a checkpoint of their own, which is what its users have.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.decoding.engines import COUNTING_ENGINE, Engine, run_engines
from layerskip_vllm.tools import stdlib_corpus
from layerskip_vllm.tools.commands import main as run_command
from layerskip_vllm.tools.hardware import describe_hardware
from layerskip_vllm.tools.output import make_console, write_json
from layerskip_vllm.tools.prompts import held_out_prompts

MODEL = Path("checkpoints/stdlib-24l")
EXIT_LAYER, NUM_SPECULATIVE_TOKENS = 6, 4
NUM_PROMPTS, MAX_TOKENS = 16, 96


@dataclass(frozen=True)
class UpdatedDrafts:
    """What a system drafted before and after the change.

    Attributes:
        system: Its name.
        before: The share of draft tokens accepted with the old weights.
        after: With the new ones.
    """

    system: str
    before: float
    after: float


def train_on(folder: Path, num_steps: int) -> None:
    """Trains the embedded checkpoint on, with the early exit loss, on its text in capitals.

    Args:
        folder: Where the result goes.
        num_steps: Optimizer steps of 8 sequences of 256 tokens.

    Raises:
        RuntimeError: If the training fails.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    corpus = folder.with_suffix(".jsonl")
    with corpus.open("w", encoding="utf-8") as lines:
        for file in stdlib_corpus.train_files():
            lines.write(json.dumps({"text": file.text.upper()}) + "\n")
    config = {
        "model": {"path": str(MODEL)},
        "data": {"train": [{"path": str(corpus)}], "seq_len": 256},
        "layerskip": {"max_drop_prob": 0.0, "e_scale": 1.0, "rotation": 4},
        "sequences_per_step": 8,
        "training": {
            "output_dir": str(folder),
            "max_steps": num_steps,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
            "use_cpu": not torch.cuda.is_available(),
        },
    }
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(json.dumps(config, indent=2))  # JSON is YAML
    if run_command(["train", str(recipe)]) != 0:
        raise RuntimeError(f"`layerskip-vllm train {recipe}` failed; see above.")


def compare_drafters(folder: Path, updated: Path) -> list[UpdatedDrafts]:
    """Run both systems with the old weights and, in the same engines, with the new ones."""
    draft = folder / "old-first-layers"
    model = AutoModelForCausalLM.from_pretrained(MODEL, num_hidden_layers=EXIT_LAYER)
    model.save_pretrained(draft)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(draft)
    drafting = {"num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
    systems: dict[str, dict[str, Any]] = {
        "layerskip": {"method": "layerskip", "exit_layer": EXIT_LAYER, **drafting},
        "draft_model": {"method": "draft_model", "model": str(draft), **drafting},
    }
    engine_args = {
        name: {**COUNTING_ENGINE, "model": str(MODEL), "speculative_config": speculative}
        for name, speculative in systems.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = held_out_prompts(NUM_PROMPTS)
    prompts = [tokenizer.encode(text.upper()) for text in texts]
    results = []
    for name, engine_arguments in engine_args.items():
        with run_engines({name: engine_arguments}, folder) as (engine,):
            before = _accepted(engine, prompts)
            engine.reload_weights(updated.resolve())
            results.append(UpdatedDrafts(name, before, _accepted(engine, prompts)))
    return results


def _accepted(engine: Engine, prompts: list[list[int]]) -> float:
    return engine.run_round(prompts, MAX_TOKENS, temperature=0.0).counters.acceptance_rate


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-steps", type=int, default=100, help="steps of the new weights")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-output/live-weights"))
    options = parser.parse_args()
    updated = options.folder / f"after-{options.num_steps}-steps"
    if not (updated / "model.safetensors").exists():
        train_on(updated, options.num_steps)
    results = compare_drafters(options.folder, updated)
    table = Table("drafts of", "accepted before", "after", title="Weights changed in place")
    for result in results:
        table.add_row(result.system, f"{result.before:.0%}", f"{result.after:.0%}")
    console = make_console()
    console.print(describe_hardware(), f"{options.num_steps} steps between the weights")
    console.print(table)
    report = {
        "hardware": describe_hardware(),
        "num_steps": options.num_steps,
        "results": [dataclasses.asdict(result) for result in results],
    }
    write_json(options.folder / "live-weights.json", report)


if __name__ == "__main__":
    main()
