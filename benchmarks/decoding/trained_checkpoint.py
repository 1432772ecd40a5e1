"""A trained checkpoint, for `benchmarks.decoding.speedup --model`: its draft and its prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.decoding.synthetic_checkpoint import SyntheticCheckpoint
from layerskip_vllm.checkpoint.entry import DraftSettings, default_settings
from layerskip_vllm.checkpoint.weight_shares import layer_of_weight
from layerskip_vllm.tools.prompts import held_out_prompts

# A token is rarely fewer characters of code, and what is too long is cut.
_CHARACTERS_PER_TOKEN = 6


def read_draft_settings(model: Path) -> DraftSettings:
    """Return the E and K that layerskip takes for a checkpoint by itself."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    return default_settings(str(model), config, config.num_hidden_layers)


def cut_first_layers(model: Path, exit_layer: int, root: Path) -> SyntheticCheckpoint:
    """Write a checkpoint's first layers as one of their own, for vLLM's `draft_model`.

    Args:
        model: The folder of the whole, with safetensors.
        exit_layer: How many layers to keep.
        root: Where to write.

    Returns:
        Both folders.
    """
    from safetensors.torch import load_file, save_file

    folder = root / f"{model.name}-first-{exit_layer}"
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            layer = layer_of_weight(name)
            if layer is None or layer < exit_layer:
                kept[name] = weight
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = exit_layer
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return SyntheticCheckpoint(folder=model, draft_folder=folder)


def make_code_prompts(model: Path, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Return the last tokens of held-out code where a function's body is about to begin.

    Args:
        model: The folder with the tokenizer.
        num_prompts: How many.
        num_tokens: Of each, at most.

    Returns:
        Their tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = held_out_prompts(num_prompts, num_tokens * _CHARACTERS_PER_TOKEN)
    return [tokenizer.encode(text)[-num_tokens:] for text in texts]
