"""Draws the demo's result as one PNG: speed with one request and with many, and acceptance."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.serving.comparison import Comparison, Speed
from benchmarks.serving.report import RunSetting, describe_equality, is_every_token_same
from layerskip_vllm.tools.chart_style import INK, LAYERSKIP, MUTED, PLAIN, TRACK, WRONG, style_axes

_LEFT = 0.03


def make_demo_figure(comparisons: Sequence[Comparison], setting: RunSetting) -> Figure:
    """Return the picture.

    Args:
        comparisons: The result, one for each number of requests.
        setting: What was run, for the lines below the charts.

    Returns:
        A chart of speeds for each number of requests, and the acceptance with the first of them.
    """
    num_loads = len(comparisons)
    figure = Figure(figsize=(max(9.0, 5.0 + 3.2 * num_loads), 5.4), dpi=150, facecolor="white")
    *speeds, acceptance = figure.subplots(
        1, num_loads + 1, gridspec_kw={"width_ratios": [1] * num_loads + [1.6]}
    )
    figure.subplots_adjust(left=_LEFT, right=0.97, top=0.7, bottom=0.28, wspace=0.22)
    for axes, comparison in zip(speeds, comparisons, strict=True):
        _draw_speeds(axes, comparison)
    _draw_acceptance(acceptance, comparisons[0])
    _write_headline(figure, comparisons)
    figure.text(_LEFT, 0.035, setting.describe(), color=MUTED, fontsize=9.5, linespacing=1.5)
    return figure


def _write_headline(figure: Figure, comparisons: Sequence[Comparison]) -> None:
    gains = ", ".join(f"{c.load}: {c.speedup:.2f} times" for c in comparisons)
    headline = f"{gains[0].upper()}{gains[1:]} plain vLLM"
    size = min(21.0, 116 * figure.get_figwidth() / len(headline))  # as wide as the picture at most
    figure.text(_LEFT, 0.915, headline, fontsize=size, fontweight="bold", color=INK)
    color = LAYERSKIP if is_every_token_same(comparisons) else WRONG
    equality = describe_equality(comparisons)
    figure.text(_LEFT, 0.855, f"LayerSkip in vLLM, {equality}", fontsize=12.5, color=color)


def _draw_speeds(axes: Axes, comparison: Comparison) -> None:
    """Draw a bar for each server, and beside it a line from its slowest to its fastest round."""
    servers = (comparison.plain, comparison.layerskip)
    values = [speed.tokens_per_s for speed in servers]
    bars = axes.bar(("plain", "layerskip"), values, width=0.62, color=(PLAIN, LAYERSKIP))
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=12, fontweight="bold", color=INK)
    for position, speed in enumerate(servers):
        by_round = speed.tokens_per_s_by_round
        axes.vlines(position + 0.38, min(by_round), max(by_round), color=MUTED, linewidth=2)
    axes.set_ylim(0, max(1.15 * max(values), 1.04 * max(map(_fastest, servers))))
    axes.margins(x=0.12)
    axes.set_yticks([])
    if len(comparison.plain.tokens_per_s_by_round) > 1:
        axes.set_xlabel("line: slowest to fastest round", color=MUTED, fontsize=9)
    load = comparison.load.capitalize()
    style_axes(axes, f"{load}: {comparison.speedup:.2f} times", "tokens a second")


def _fastest(speed: Speed) -> float:
    return max(speed.tokens_per_s_by_round)


def _draw_acceptance(axes: Axes, comparison: Comparison) -> None:
    shares = comparison.counters.acceptance_by_position
    positions = range(1, len(shares) + 1)
    axes.bar(positions, 100, width=0.7, color=TRACK)
    bars = axes.bar(positions, [100 * share for share in shares], width=0.7, color=LAYERSKIP)
    size = min(12, 96 / len(shares))
    axes.bar_label(bars, fmt="%.0f%%", padding=3, fontsize=size, fontweight="bold", color=INK)
    axes.set_ylim(0, 115)
    axes.set_xticks(positions)
    axes.set_yticks([])
    axes.set_xlabel("position in the draft", color=MUTED, fontsize=9)
    length = comparison.counters.mean_acceptance_length
    style_axes(
        axes,
        f"Drafted tokens accepted, {comparison.load}",
        f"mean acceptance length {length:.2f}; plain vLLM's is 1",
    )
