"""Draws a comparison as one PNG: speed, latency, acceptance by position."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.serving.comparison import Comparison, Speed
from benchmarks.serving.report import RunSetting, describe_equality
from layerskip_vllm.tools.chart_style import INK, LAYERSKIP, MUTED, PLAIN, TRACK, WRONG, style_axes

_LEFT = 0.025


def draw_comparison(path: Path, comparison: Comparison, setting: RunSetting) -> None:
    """Writes the picture.

    Args:
        path: File to write, ending in `.png`.
        comparison: The result.
        setting: What was run, for the lines below the charts.
    """
    figure = Figure(figsize=(12, 5.6), dpi=150, facecolor="white")
    speed, ttft, tpot, acceptance = figure.subplots(
        1, 4, gridspec_kw={"width_ratios": [1, 1, 1, 1.8]}
    )
    figure.subplots_adjust(left=_LEFT, right=0.98, top=0.7, bottom=0.25, wspace=0.28)
    plain, layerskip = comparison.plain, comparison.layerskip
    speeds = plain.tokens_per_s, layerskip.tokens_per_s
    _draw_pair(speed, "Tokens a second", "higher is better", *speeds)
    if setting.num_rounds > 1:
        _draw_ranges(speed, plain, layerskip)
    ttfts_ms = plain.ttft_ms, layerskip.ttft_ms
    _draw_pair(ttft, "Time to first token", "ms, lower is better", *ttfts_ms)
    tpots_ms = plain.tpot_ms, layerskip.tpot_ms
    _draw_pair(tpot, "Time per output token", "ms, lower is better", *tpots_ms)
    _draw_acceptance(acceptance, comparison)
    _write_headline(figure, comparison)
    lines = (setting.describe_run(), setting.describe_load(), setting.describe_machine())
    figure.text(_LEFT, 0.035, "\n".join(lines), color=MUTED, fontsize=9.5, linespacing=1.5)
    figure.savefig(path)


def _write_headline(figure: Figure, comparison: Comparison) -> None:
    figure.text(
        _LEFT,
        0.91,
        f"LayerSkip in vLLM: {comparison.speedup:.2f} times the tokens a second",
        fontsize=19,
        fontweight="bold",
        color=INK,
    )
    figure.text(
        _LEFT,
        0.85,
        f"Every token the same as plain vLLM's: {describe_equality(comparison)}",
        fontsize=12.5,
        color=LAYERSKIP if comparison.is_every_token_same else WRONG,
    )


def _draw_pair(axes: Axes, title: str, hint: str, plain: float, layerskip: float) -> None:
    values = (plain, layerskip)
    bars = axes.bar(("plain", "layerskip"), values, width=0.62, color=(PLAIN, LAYERSKIP))
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=12, fontweight="bold", color=INK)
    axes.set_ylim(0, 1.15 * max(values))
    axes.margins(x=0.12)
    style_axes(axes, title, hint)
    axes.set_yticks([])


def _draw_ranges(axes: Axes, *speeds: Speed) -> None:
    """Adds a line from the slowest to the fastest round, and says so."""
    for position, speed in enumerate(speeds):
        by_round = speed.tokens_per_s_by_round
        axes.vlines(position + 0.38, min(by_round), max(by_round), color=MUTED, linewidth=2)
    axes.set_ylim(
        0, max(axes.get_ylim()[1], 1.04 * max(max(s.tokens_per_s_by_round) for s in speeds))
    )
    axes.set_xlabel("line: slowest to fastest round", color=MUTED, fontsize=9)


def _draw_acceptance(axes: Axes, comparison: Comparison) -> None:
    shares = comparison.counters.acceptance_by_position
    positions = range(1, len(shares) + 1)
    axes.bar(positions, 100, width=0.7, color=TRACK)
    bars = axes.bar(positions, [100 * share for share in shares], width=0.7, color=LAYERSKIP)
    label_size = 12 if len(shares) <= 6 else 9
    axes.bar_label(
        bars, fmt="%.0f %%", padding=3, fontsize=label_size, fontweight="bold", color=INK
    )
    axes.set_ylim(0, 115)
    axes.set_xticks(positions)
    axes.set_xlabel("position in the draft", color=MUTED, fontsize=10)
    hint = (
        f"{comparison.counters.mean_acceptance_length:.2f} tokens a step and request; plain makes 1"
    )
    style_axes(axes, "Drafted tokens accepted", hint)
    axes.set_yticks([])
