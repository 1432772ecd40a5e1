"""Draws what `benchmarks.training.three_curves` has found so far.

    python -m benchmarks.training.three_curves_picture

Prints a table, and writes `three-curves.json` and `three-curves.png` beside the curves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from transformers import AutoConfig

from benchmarks.training.curve_learners import NUM_SPECULATIVE_TOKENS
from benchmarks.training.curve_training import FIRST_POINT
from benchmarks.training.three_curves import OUTPUT, STUDY_FILE
from layerskip_vllm.checkpoint.weight_shares import find_folder, read_shares
from layerskip_vllm.tools.chart_style import INK, LAYERSKIP, MUTED, PLAIN, TRACK, style_axes
from layerskip_vllm.tools.output import make_console, write_json
from layerskip_vllm.tools.speedup_bound import cost_of_round

NAMES = {"exit_adapter": "exit adapter", "draft_lora": "draft LoRA", "recipe": "the paper's recipe"}
COLORS = {"exit_adapter": MUTED, "draft_lora": LAYERSKIP, "recipe": "#7c3aed"}
DRAFT_VOCAB_SHARE = 0.125
MIN_TOKENS = 2**20  # from which on there is something to decide


def read_points(folder: Path) -> list[dict[str, Any]]:
    """Read the points of all curves in a folder, each with its curve's name."""
    points = []
    for file in sorted(folder.glob("*.pt")):
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        curve = file.stem.partition("-")[0]
        points += [{"curve": curve, **point} for point in state["points"]]
    return points


def find_break_even(model: str, exit_layer: int) -> dict[str, float]:
    """Return how many of K drafts must be accepted for plain decoding's speed, by bytes read.

    With the whole head, and with a draft vocabulary of an eighth. What a curve adds to the weights
    is not counted: an adapter is next to nothing, a LoRA can be merged into a copy of the layers.
    """
    num_layers = AutoConfig.from_pretrained(model).num_hidden_layers
    shares = read_shares(find_folder(model), num_layers, exit_layer)
    if shares is None:
        raise ValueError(f"model is {model!r}, whose weights are not on this machine.")
    totals = {
        "whole head": shares.total,
        "an eighth of the head": shares.with_draft_vocab(DRAFT_VOCAB_SHARE).total,
    }
    return {
        name: cost_of_round(total, NUM_SPECULATIVE_TOKENS) - 1 for name, total in totals.items()
    }


def make_figure(
    points: Sequence[Mapping[str, Any]], break_even: Mapping[int, Mapping[str, float]]
) -> Figure:
    """Draw a line of charts for each exit, a chart for each kind of text."""
    kinds = list(points[0]["drafts"])
    size = (4.6 * len(kinds), 3.9 * len(break_even))
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    all_axes = figure.subplots(len(break_even), len(kinds), squeeze=False, sharey="row")
    for row, (exit_layer, limits) in zip(all_axes, break_even.items(), strict=True):
        of_exit = [point for point in points if point["exit_layer"] == exit_layer]
        for axes, kind in zip(row, kinds, strict=True):
            _draw_curves(axes, of_exit, kind, limits)
            style_axes(axes, f"E = {exit_layer}, {kind}", "accepted of 4, by tokens trained")
    all_axes[0][0].legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _draw_curves(
    axes: Axes, points: Sequence[Mapping[str, Any]], kind: str, limits: Mapping[str, float]
) -> None:
    for curve, name in NAMES.items():
        line = [
            (point["tokens"], point["drafts"][kind]["accepted"])
            for point in points
            if point["curve"] == curve
        ]
        if line:
            axes.plot(*zip(*line, strict=True), ".-", color=COLORS[curve], label=name)
    for name, limit in limits.items():
        axes.axhline(limit, color=PLAIN, linewidth=1, linestyle="--", zorder=0)
        axes.annotate(
            f"pays above, {name}", (0, limit), (4, 3), axes.get_yaxis_transform(),
            textcoords="offset points", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_xscale("symlog", base=2, linthresh=FIRST_POINT, linscale=1)
    last = max(MIN_TOKENS, *(point["tokens"] for point in points))
    ticks = [0] + [FIRST_POINT * 4**n for n in range(32) if FIRST_POINT * 4**n <= last]
    axes.set_xticks(ticks, [f"{tick / 1000:.0f} k" for tick in ticks])
    axes.set_xlim(0, 1.1 * last)
    axes.tick_params(which="minor", length=0)
    axes.axvline(MIN_TOKENS, color=TRACK, linewidth=4, zorder=0)
    axes.set_ylim(0, NUM_SPECULATIVE_TOKENS)


def make_points_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out each curve's points, a line each."""
    kinds = list(points[0]["drafts"])
    table = Table("curve", title="accepted of 4 (first draft right, of all places)")
    for heading in ("E", "tokens", *kinds, "last layer's loss"):
        table.add_column(heading, justify="right")
    for point in points:
        drafts = [point["drafts"][kind] for kind in kinds]
        loss = point["last_loss"]
        table.add_row(
            NAMES[point["curve"]],
            str(point["exit_layer"]),
            f"{point['tokens']:,}",
            *(f"{d['accepted']:.2f} ({d['agreement']:.0%})" for d in drafts),
            "unchanged" if loss is None else f"{loss:.3f}",
        )
    return table


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the folder of the curves")
    folder = parser.parse_args().output
    points = read_points(folder)
    if not points:
        raise ValueError(
            f"--output is {str(folder)!r}, in which no curve has a point; name the folder that "
            "benchmarks.training.three_curves wrote."
        )
    identity = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))["identity"]
    exit_layers = sorted({point["exit_layer"] for point in points})
    break_even = {exit_: find_break_even(identity["model"], exit_) for exit_ in exit_layers}
    make_console().print(make_points_table(points))
    report = {"identity": identity, "break_even": break_even, "points": points}
    write_json(folder / "three-curves.json", report)
    make_figure(points, break_even).savefig(folder / "three-curves.png")
    make_console().print(f"Written: {folder / 'three-curves.png'}")


if __name__ == "__main__":
    main()
