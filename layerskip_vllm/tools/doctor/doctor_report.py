"""What `layerskip-vllm doctor` has found, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DoctorReport:
    """All that the doctor found; `problems` decides the exit status."""

    versions: dict[str, str | None] = field(default_factory=dict)  # None if missing
    plugin: dict[str, str] = field(default_factory=dict)
    hooks: list[dict[str, Any]] = field(default_factory=list)  # target, why, state, problems
    devices: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # a sentence or more each


def format_report(report: DoctorReport) -> str:
    """Return the report as plain text in aligned columns."""
    devices = dict(report.devices)
    if "cuda" in devices:
        devices["cuda"] = "\n".join(devices["cuda"]) or "none"
    sections = [
        ("versions", [(key, value or "not installed") for key, value in report.versions.items()]),
        ("plugin", list(report.plugin.items())),
        ("hooks", _hook_rows(report)),
        ("devices", list(devices.items())),
        ("checkpoint", _checkpoint_rows(report.checkpoint)),
    ]
    text = "\n\n".join(f"{title}\n{_align(rows)}" for title, rows in sections if rows)
    if not report.problems:
        return f"{text}\n\nno problem found"
    problems = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in report.problems)
    return f"{text}\n\nproblems\n{problems}"


def _hook_rows(report: DoctorReport) -> list[tuple[str, str]]:
    rows = []
    for hook in report.hooks:
        lines = [hook["target"], f"  {hook['why']}", *(f"  {text}" for text in hook["problems"])]
        rows.append((hook["state"], "\n".join(lines)))
    return rows


def _checkpoint_rows(checkpoint: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = [
        (key, str(checkpoint[key]))
        for key in ("model", "architecture", "layers", "dtype", "draft")
        if key in checkpoint
    ]
    for key in ("exit_layer", "num_speculative_tokens"):
        if key in checkpoint:
            rows.append((key, f"{checkpoint[key]}, from {checkpoint[f'{key} from']}"))
    if "shares from" in checkpoint:
        layers, head = checkpoint["share of layers"], checkpoint["share of head"]
        parts = f"(layers {layers:.1%}, head {head:.1%}), from {checkpoint['shares from']}"
        rows.append(("a draft step reads", f"{layers + head:.1%} of the model's bytes {parts}"))
    return rows


def _align(rows: list[tuple[str, str]]) -> str:
    width = max(len(key) for key, _ in rows)
    indent = "\n" + " " * (width + 4)
    return "\n".join(f"  {key:<{width}}  " + value.replace("\n", indent) for key, value in rows)
