"""Draws what `benchmarks.decoding.speedup` has found: speed beside plain vLLM's, by load."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerskip_vllm.tools.chart_style import INK, LAYERSKIP, MUTED, PLAIN, style_axes

_COLORS = {"layerskip": LAYERSKIP, "draft_model": MUTED, "ngram": PLAIN}
# Of layerskip with speed settings.
_OWN_COLORS = ("#14b8a6", "#0891b2", "#2563eb", "#7c3aed", "#c026d3")


def make_speedup_figure(tables: Mapping[str, Sequence[Mapping[str, Any]]], hardware: str) -> Figure:
    """Return the picture.

    Args:
        tables: The lines of each shape's table, `Summary` objects as dictionaries.
        hardware: What they were measured on.

    Returns:
        A chart a shape.
    """
    width = max(9.0, 6.5 * len(tables))
    figure = Figure(figsize=(width, 4.8), dpi=150, facecolor="white", layout="constrained")
    all_axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (name, lines) in zip(all_axes, tables.items(), strict=True):
        _draw_speedups(axes, name, [line for line in lines if line["speedup"] is not None])
    figure.supxlabel(hardware, color=MUTED, fontsize=9)
    return figure


def _draw_speedups(axes: Axes, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    loads = list(dict.fromkeys(_name_load(line) for line in lines))
    systems = list(dict.fromkeys(line["system"] for line in lines if line["system"] != "plain"))
    own = [system for system in systems if system not in _COLORS]
    colors = _COLORS | dict(zip(own, itertools.cycle(_OWN_COLORS), strict=False))
    width = 0.8 / max(1, len(systems))
    for index, system in enumerate(systems):
        by_load = {_name_load(line): line for line in lines if line["system"] == system}
        places = [loads.index(load) + (index - (len(systems) - 1) / 2) * width for load in by_load]
        values = [line["speedup"] for line in by_load.values()]
        bars = axes.bar(places, values, width=0.92 * width, color=colors[system], label=system)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8, color=INK)
        bounds = [(x, line["bound"]) for x, line in zip(places, by_load.values(), strict=True)]
        for x, bound in bounds:
            if bound is not None:
                axes.hlines(bound, x - width / 2, x + width / 2, color=INK, linewidth=1)
    axes.axhline(1, color=PLAIN, linewidth=1, zorder=0)
    axes.set_xticks(range(len(loads)), loads)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
    axes.margins(y=0.18)
    style_axes(axes, name, "times plain vLLM's tokens a second; line: what the bytes read allow")


def _name_load(line: Mapping[str, Any]) -> str:
    load = line["load"]
    return f"batch {load['batch_size']},\nprompt {load['num_prompt_tokens']:,}"
