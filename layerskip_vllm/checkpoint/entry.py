"""Where drafting exits and how far it goes when the user does not say.

Called by `config` at engine start and by `layerskip-vllm doctor`, which read a checkpoint's entry,
and by `layerskip-vllm exits`, which writes one; plain Python, no vLLM.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_KEY = "layerskip"
DEFAULT_NUM_SPECULATIVE_TOKENS = 4

# The (E, K) pairs that were published for Meta's checkpoints.
# Sources: llama2-7B from the README of facebookresearch/LayerSkip; 13B from Table 3 of
# arXiv 2404.16710 (XSUM); 70B, llama3-8B and llama3.2-1B from DEL (arXiv 2504.05598), its scripts.
# None were published for the two CodeLlama checkpoints: the 7B one takes llama2-7B's (the same
# shape, and Table 3 uses it on HumanEval), the 34B one a quarter of its layers.
PUBLISHED_SETTINGS = {
    "layerskip-llama2-7b": (8, 6),
    "layerskip-llama2-13b": (15, 4),
    "layerskip-llama2-70b": (9, 6),
    "layerskip-codellama-7b": (8, 6),
    "layerskip-codellama-34b": (12, 4),
    "layerskip-llama3-8b": (3, 3),
    "layerskip-llama3.2-1b": (3, 6),
}


@dataclass(frozen=True)
class Setting:
    """A number and where it comes from, for messages."""

    value: int
    source: str


@dataclass(frozen=True)
class DraftSettings:
    """How a checkpoint drafts."""

    exit_layer: Setting  # E, the number of layers that a draft step runs: layers [0, E)
    num_speculative_tokens: Setting  # K, the number of tokens drafted for each verification


def make_entry(
    exit_layer: int | None, num_speculative_tokens: int | None, num_layers: int
) -> dict[str, int]:
    """Make a `layerskip` entry; what is None becomes a quarter of the layers, and K = 4."""
    return {
        "exit_layer": exit_layer or max(1, num_layers // 4),
        "num_speculative_tokens": num_speculative_tokens or DEFAULT_NUM_SPECULATIVE_TOKENS,
    }


def check_positive_int(name: str, value: Any) -> None:
    """Refuse what is not an integer of at least 1; a bool, a float or a numeral in a string too."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")


def default_settings(model: str, hf_config: Any, num_layers: int) -> DraftSettings:
    """Find the settings for a checkpoint whose user named none.

    The checkpoint's own `layerskip` entry wins, then the table of published checkpoints (by the
    last part of the model's name or path), then a quarter of the layers and K = 4. `ValueError` if
    the entry is not of the right form.
    """
    name = model.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    if name in PUBLISHED_SETTINGS:
        source = "the table of published checkpoints"
        exit_layer, num_speculative_tokens = (
            Setting(value, source) for value in PUBLISHED_SETTINGS[name]
        )
    else:
        default = make_entry(None, None, num_layers)
        exit_layer = Setting(default["exit_layer"], "a quarter of the layers")
        num_speculative_tokens = Setting(default["num_speculative_tokens"], "the default")
    entry = _checked_entry(getattr(hf_config, CONFIG_KEY, None))
    return DraftSettings(
        entry.get("exit_layer", exit_layer),
        entry.get("num_speculative_tokens", num_speculative_tokens),
    )


def _checked_entry(entry: Any) -> dict[str, Setting]:
    where = f"'{CONFIG_KEY}' in the checkpoint's config.json"
    fields = ("exit_layer", "num_speculative_tokens")
    if entry is None:
        return {}
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{where} is {entry!r}; it must be an object such as "
            '{"exit_layer": 8, "num_speculative_tokens": 6}.'
        )
    for key, value in entry.items():
        if key not in fields:
            raise ValueError(f"{where} has the unknown key {key!r}; known are {', '.join(fields)}.")
        check_positive_int(f"{key} of {where}", value)
    return {key: Setting(value, "the checkpoint's config.json") for key, value in entry.items()}


def write_entry(folder: Path, entry: Mapping[str, int]) -> None:
    """Put a `layerskip` entry into a checkpoint's `config.json`; all else in it stays.

    The file is replaced, not written into: in Hugging Face's cache it is a link to a shared one.
    `ValueError` if it is not a JSON object, or `entry` is not of the right form.
    """
    _checked_entry(entry)
    file = folder / "config.json"
    text = file.read_text(encoding="utf-8")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds {text[:40]!r}; it must be a JSON object.")
    indent = re.match(r"\{\n([ \t]+)", text)
    written = json.dumps(
        {**config, CONFIG_KEY: dict(entry)},
        indent=indent[1] if indent else None,
        ensure_ascii=text.isascii(),
    )
    new_file = file.with_name(f"{file.name}.{os.getpid()}")
    new_file.write_text(written + "\n" * text.endswith("\n"), encoding="utf-8")
    shutil.copymode(file, new_file)
    new_file.replace(file)
