"""Draws all exits as one PNG: where to exit, why, and what the exits cost in loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from layerskip_vllm.tools.chart_style import INK, LAYERSKIP, MUTED, PLAIN, TRACK, WRONG, style_axes
from layerskip_vllm.tools.exits.exit_report import ExitReport
from layerskip_vllm.tools.speedup_map import draw_speedup_map

_LEFT = 0.06
_LINE: dict[str, Any] = {"linewidth": 2.5, "marker": "o", "markersize": 4}


def draw_exits(path: Path, report: ExitReport) -> None:
    """Write the picture of every exit to a `.png` file."""
    make_exits_figure(report).savefig(path)


def make_exits_figure(report: ExitReport) -> Figure:
    """Return the picture: speed-up by E and K, agreement and loss by E, one above the other."""
    figure = Figure(figsize=(12, 10), dpi=150, facecolor="white")
    speedup, agreement, loss = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [1.5, 1, 1]}
    )
    figure.subplots_adjust(left=_LEFT, right=0.97, top=0.82, bottom=0.115, hspace=0.5)
    _draw_speedups(speedup, report)
    _draw_agreements(agreement, report)
    _draw_losses(loss, report)
    exit_layer = report.best.exit_layer
    for axes in (agreement, loss):
        axes.axvspan(exit_layer - 0.5, exit_layer + 0.5, color=TRACK, zorder=0)
    loss.set_xlabel("exit after layer", color=MUTED, fontsize=10)
    loss.set_xlim(0.5, len(report.exits) + 0.5)
    loss.xaxis.set_major_locator(MaxNLocator(nbins=26, integer=True, min_n_ticks=1))
    _write_headline(figure, report)
    figure.text(_LEFT, 0.03, report.describe_run(), color=MUTED, fontsize=9.5)
    return figure


def _write_headline(figure: Figure, report: ExitReport) -> None:
    figure.text(
        _LEFT, 0.945, report.describe(), fontsize=18, fontweight="bold", color=INK, va="center"
    )
    best = report.best
    share = report.exits[best.exit_layer - 1].draft_share
    words = (
        f"{best.acceptance.rate:.0%} of the drafts accepted; a draft step reads {share:.0%} of the "
        f"bytes that a whole step reads, the head alone {report.head_share:.0%}"
    )
    color = LAYERSKIP if report.pays else WRONG
    figure.text(_LEFT, 0.905, words, fontsize=12.5, color=color, va="center")


def _draw_speedups(axes: Axes, report: ExitReport) -> None:
    speedups = [[draft.speedup for draft in exit_.drafts] for exit_ in report.exits[:-1]]
    draw_speedup_map(axes, speedups, (report.best.exit_layer, report.best.num_speculative_tokens))
    style_axes(
        axes, "Speed-up, at best", "times plain decoding, if reading weights were all its cost"
    )


def _draw_agreements(axes: Axes, report: ExitReport) -> None:
    layers = [exit_.exit_layer for exit_ in report.exits]
    agreements = [exit_.agreement for exit_ in report.exits]
    num = report.best.num_speculative_tokens
    rates = [exit_.drafts[num - 1].acceptance.rate for exit_ in report.exits[:-1]]
    axes.plot(layers, agreements, color=PLAIN, **_LINE)
    axes.plot(layers[:-1], rates, color=LAYERSKIP, **_LINE)
    exit_layer = report.best.exit_layer
    _write_value(axes, exit_layer, agreements[exit_layer - 1], "{:.0%}", above=True)
    _write_value(axes, exit_layer, rates[exit_layer - 1], "{:.0%}", above=False)
    axes.set_ylim(-0.2, 1.2)  # room for labels at both ends
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    style_axes(
        axes,
        "Agreement with the last layer",
        f"green: greedy drafts of {num} accepted; grey: the same token on held-out text",
    )
    axes.grid(axis="y", color=TRACK)


def _draw_losses(axes: Axes, report: ExitReport) -> None:
    losses = [exit_.loss for exit_ in report.exits]
    axes.axhline(losses[-1], color=PLAIN, linewidth=1.5, linestyle=(0, (4, 3)))
    axes.plot([exit_.exit_layer for exit_ in report.exits], losses, color=LAYERSKIP, **_LINE)
    axes.margins(y=0.25)
    exit_layer = report.best.exit_layer
    _write_value(axes, exit_layer, losses[exit_layer - 1], "{:.3f}", above=True)
    style_axes(axes, "Held-out loss", f"nats per token; the whole model's is {losses[-1]:.3f}")
    axes.grid(axis="y", color=TRACK)


def _write_value(axes: Axes, exit_layer: int, value: float, form: str, above: bool) -> None:
    is_first = exit_layer == 1  # on the axis, which half of a text would run over
    axes.annotate(
        form.format(value),
        (exit_layer, value),
        (-4 if is_first else 0, 8 if above else -8),
        textcoords="offset points",
        ha="left" if is_first else "center",
        va="bottom" if above else "top",
        fontsize=10,
        fontweight="bold",
        color=INK,
    )
