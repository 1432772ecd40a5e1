"""Three ways to a model whose first layers draft: accepted drafts by tokens trained.

    python -m benchmarks.training.three_curves --curve exit_adapter --exit-layer 9
    python -m benchmarks.training.three_curves --curve draft_lora --exit-layer 9
    python -m benchmarks.training.three_curves --curve recipe --exit-layer 9 15

Each command trains until `--num-tokens` and stops; again, or with more tokens, it goes on where it
was. It saves every few minutes, and at once when it is asked to end (SIGTERM). All curves in one
folder learn the same rows in the same order and complete the same prompts;
`benchmarks.training.three_curves_picture` draws them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.curve_learners import (
    DraftLoraLearner,
    ExitAdapterLearner,
    Learner,
    RecipeLearner,
)
from benchmarks.training.curve_measurement import (
    Completions,
    answer_prompts,
    measure_chains,
    measure_last_loss,
)
from benchmarks.training.curve_targets import TargetFile
from benchmarks.training.curve_text import cut_study_prompts, make_rows, read_split
from benchmarks.training.curve_training import Curve, StopRequest, train_curve
from layerskip_vllm.tools.exits.measure import find_eos_token_ids, load_decoder
from layerskip_vllm.tools.output import write_json
from layerskip_vllm.tools.text import encode_documents

CURVES = ("exit_adapter", "draft_lora", "recipe")
OUTPUT = Path("build/curves")
STUDY_FILE = "study.json"
NUM_NEW_TOKENS = 96
NUM_LOSS_SEQUENCES = 32


def open_study(
    folder: Path, identity: Mapping[str, Any], prompts: Mapping[str, list[list[int]]]
) -> Mapping[str, list[list[int]]]:
    """Note what all curves of a folder share, once; returns the prompts that were noted first.

    `ValueError` if the folder holds a study of another model or text.
    """
    file = folder / STUDY_FILE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        write_json(unfinished, {"identity": identity, "prompts": prompts})
        os.replace(unfinished, file)
    study = json.loads(file.read_text(encoding="utf-8"))
    for name, value in identity.items():
        if study["identity"].get(name) != value:
            raise ValueError(
                f"--output is {str(folder)!r}, whose curves have {name} "
                f"{study['identity'].get(name)!r}, not {value!r}; choose another folder."
            )
    noted: Mapping[str, list[list[int]]] = study["prompts"]
    return noted


def main() -> None:
    """Run the command line."""
    options = parse_args()
    stop = StopRequest()
    signal.signal(signal.SIGTERM, stop)
    is_recipe = options.curve == "recipe"
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load_decoder(options.model, None, "float32" if is_recipe else options.dtype)
    model.requires_grad_(False)
    eos_token_ids = find_eos_token_ids(model, tokenizer)
    train_texts, held_out = read_split(options.data)
    rows = make_rows(tokenizer, train_texts, options.seq_len)
    sequences = encode_documents(tokenizer, held_out).cut_sequences(
        options.seq_len - 1, NUM_LOSS_SEQUENCES * options.seq_len
    )
    identity = {
        "model": options.model,
        "dtype": options.dtype,
        "seq_len": options.seq_len,
        "rows_per_step": options.rows_per_step,
        "rows": hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16],
    }
    prompts = open_study(options.output, identity, cut_study_prompts(tokenizer, held_out))
    rows, sequences = rows.to(model.device), sequences.to(model.device)
    learner = make_learner(options, model, rows, dtype)
    answered: dict[str, Completions] = {}

    def measure() -> list[dict[str, Any]]:
        for kind in prompts:
            if kind not in answered or learner.changes_model:
                answered[kind] = answer_prompts(model, prompts[kind], NUM_NEW_TOKENS, eos_token_ids)
        last_loss = measure_last_loss(model, sequences) if learner.changes_model else None
        return [
            {
                "exit_layer": exit_layer,
                "last_loss": last_loss,
                "drafts": {
                    kind: asdict(measure_chains(learner, model.lm_head, exit_layer, completions))
                    for kind, completions in answered.items()
                },
            }
            for exit_layer in learner.exit_layers
        ]

    name = options.curve if is_recipe else f"{options.curve}-{options.exit_layer[0]}"
    curve = Curve(learner, options.output / f"{name}.pt")
    train_curve(curve, rows, options.rows_per_step, options.num_tokens, measure, stop)
    if options.checkpoint is not None:
        with curve.averaged():
            model.save_pretrained(options.checkpoint)
        tokenizer.save_pretrained(options.checkpoint)


def make_learner(
    options: argparse.Namespace, model: Any, rows: torch.Tensor, dtype: torch.dtype
) -> Learner:
    """Make what the command line asks for; `ValueError` if it does not fit the model."""
    num_layers = model.config.num_hidden_layers
    for exit_layer in options.exit_layer:
        if not 1 <= exit_layer < num_layers:
            raise ValueError(
                f"--exit-layer is {exit_layer}; it must be from 1 to {num_layers - 1}, as the "
                f"model has {num_layers} layers."
            )
    if options.curve == "recipe":
        return RecipeLearner(model, tuple(options.exit_layer), dtype)
    if len(options.exit_layer) > 1:
        raise ValueError(
            f"--exit-layer is {options.exit_layer}; --curve {options.curve} trains one exit, give "
            "one."
        )
    targets = TargetFile(options.output / "targets.bin", model, rows)
    (exit_layer,) = options.exit_layer
    if options.curve == "exit_adapter":
        return ExitAdapterLearner(model, exit_layer, targets)
    return DraftLoraLearner(model, exit_layer, targets)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--curve", choices=CURVES, required=True)
    parser.add_argument("--exit-layer", type=int, nargs="+", required=True)
    parser.add_argument("--num-tokens", type=int, default=2**20, help="to train on in all")
    parser.add_argument("--model", default="build/smollm2-135m")
    parser.add_argument("--data", nargs="+", help="files and folders; the standard library if none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows-per-step", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of all curves")
    parser.add_argument("--checkpoint", type=Path, help="folder for the recipe's model, at the end")
    options = parser.parse_args()
    if options.checkpoint is not None and options.curve != "recipe":
        parser.error(f"--checkpoint goes with --curve recipe; {options.curve} changes no model.")
    return options


if __name__ == "__main__":
    main()
