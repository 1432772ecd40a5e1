"""LoRA adapters that nothing has trained, far enough from zero to change what a model says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_lora_adapter(
    folder: Path, checkpoint: Path, seed: int, targets: tuple[str, ...] = TARGETS, rank: int = 4
) -> Path:
    """Write a random adapter for a checkpoint, in peft's format.

    Args:
        folder: Where to; returned.
        checkpoint: The model's folder.
        seed: Seed of the weights.
        targets: The modules that it changes.
        rank: Of its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            shapes = {"A": (rank, weight.shape[1]), "B": (weight.shape[0], rank)}
            for part, shape in shapes.items():
                value = torch.empty(shape).normal_(0, 0.1, generator=generator)
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = value
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
