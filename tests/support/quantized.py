"""Quantised copies of the tests' checkpoints, in the format of compressed-tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import int8

_INT8: Mapping[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}


def quantize_to_int8(checkpoint: Path, folder: Path) -> Path:
    """Write a copy of a checkpoint: int8 weights with a scale a channel, activations a token.

    Args:
        checkpoint: A folder with float32 weights in one file.
        folder: Where to; returned.
    """
    shutil.copytree(checkpoint, folder)
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / 127
        tensors |= {name: (tensors[name] / scale).round().to(int8), f"{name}_scale": scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_INT8, "strategy": "channel", "dynamic": False},
                # Asymmetric: where there is AMX, vLLM's symmetric kernel takes no float32.
                "input_activations": {
                    **_INT8,
                    "symmetric": False,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
