"""Writes docs/training-settings.md from the models: `python -m scripts.training_settings_page`."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from layerskip_vllm.checkpoint.validation import describe
from layerskip_vllm.training.data import DataConfig, DataSource
from layerskip_vllm.training.exit_adapter import ExitAdapterSettings
from layerskip_vllm.training.run_config import ModelConfig, RunConfig
from layerskip_vllm.training.settings import LayerSkipSettings

PAGE = Path(__file__).parents[1] / "docs/training-settings.md"
_INTRODUCTION = """# The settings of a training run

Made by `python -m scripts.training_settings_page`; a test compares the two. [Training](training.md)
shows a config and what its parts are for. A key that is not here, or a value that is not of its
kind, stops a run before anything is loaded.
"""
_SECTIONS: dict[str, type[BaseModel]] = {
    "The config": RunConfig,
    "`model`": ModelConfig,
    "`data`": DataConfig,
    "A source of `data.train` and `data.evaluation`": DataSource,
    "`layerskip`": LayerSkipSettings,
    "`exit_adapter`": ExitAdapterSettings,
}


def write_page() -> str:
    """Write a section for each part of a config, with a table of its settings."""
    sections = (f"\n## {title}\n\n{_make_table(model)}\n" for title, model in _SECTIONS.items())
    return _INTRODUCTION + "".join(sections)


def _make_table(model: type[BaseModel]) -> str:
    rows = ["| setting | what it is | value | default |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split())
        value = describe(field.annotation, field.metadata)
        default = "needed" if field.is_required() else f"`{json.dumps(field.default)}`"
        shown = "" if default == "`null`" else default
        rows.append(f"| `{name}` | {meaning} | {value} | {shown} |")
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
