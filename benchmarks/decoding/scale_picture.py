"""Draws what `benchmarks.decoding.scale_on_paper` says: its error, and what drafting gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, PercentFormatter, StrMethodFormatter

from benchmarks.decoding.devices_and_models import FLOP_SHARE, FLOP_SHARES
from layerskip_vllm.tools.chart_style import INK, LAYERSKIP, MUTED, PLAIN, TRACK, style_axes

if TYPE_CHECKING:
    from benchmarks.decoding.measured_speeds import SpeedComparison
    from benchmarks.decoding.scale_on_paper import Case

_GROUP_COLORS = (LAYERSKIP, "#2563eb", "#7c3aed", "#d97706")
_CONTEXT_COLORS = (LAYERSKIP, "#2563eb")
_FAR = 0.15  # errors from here on are named


def make_scale_figure(
    comparisons: Mapping[str, Sequence[SpeedComparison]],
    cases: Sequence[Case],
    contexts: Sequence[int],
) -> Figure:
    """Return the picture.

    Args:
        comparisons: What was measured beside what the model says, by source.
        cases: The models whose gain is drawn.
        contexts: For which contexts, two.

    Returns:
        The errors above, a chart a model below.
    """
    figure = Figure(figsize=(13, 9.5), dpi=150, facecolor="white", layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, hspace=0.06)[:, 0]
    axes = above.subplots()
    _draw_errors(axes, comparisons)
    _add_legend(above, axes)
    charts = below.subplots(1, len(cases), sharey=True)
    for axes, case in zip(charts, cases, strict=True):
        _draw_gains(axes, case, contexts)
    _add_legend(below, charts[0])
    return figure


def _add_legend(figure: SubFigure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _draw_errors(axes: Axes, comparisons: Mapping[str, Sequence[SpeedComparison]]) -> None:
    axes.axhspan(-0.1, 0.1, color=TRACK, zorder=0)
    axes.axhline(0, color=PLAIN, linewidth=1, zorder=0)
    fastest = max(row.measured for rows in comparisons.values() for row in rows)
    for (title, rows), color in zip(comparisons.items(), _GROUP_COLORS, strict=True):
        axes.scatter(
            [row.measured for row in rows],
            [row.error for row in rows],
            facecolors=["none" if row.is_fitted else color for row in rows],
            edgecolors=color,
            s=34,
        )
        axes.scatter([], [], color=color, s=34, label=title)
        for row in rows:
            if abs(row.error) >= _FAR:
                is_right = row.measured > fastest / 4
                axes.annotate(
                    row.what,
                    (row.measured, row.error),
                    (-8 if is_right else 8, 0),
                    textcoords="offset points",
                    ha="right" if is_right else "left",
                    va="center",
                    fontsize=9,
                    color=INK,
                )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("measured, tokens a second", color=MUTED, fontsize=10)
    style_axes(
        axes,
        "By how much the model predicts more than was measured",
        "hollow: its rates were chosen on it; grey: within 10 %",
    )


def _draw_gains(axes: Axes, case: Case, contexts: Sequence[int]) -> None:
    from benchmarks.decoding.scale_on_paper import BATCH_SIZES, DRAFT_VOCAB, NUM_DRAFTS

    axes.axhline(1, color=PLAIN, linewidth=1, zorder=0)
    for context, color in zip(contexts, _CONTEXT_COLORS, strict=True):
        sizes = [size for size in BATCH_SIZES if case.model.fits(size, context)]
        lower, upper = (
            [_with_flop_share(case, share).gain(size, context, NUM_DRAFTS) for size in sizes]
            for share in FLOP_SHARES
        )
        axes.fill_between(sizes, lower, upper, color=color, alpha=0.12, linewidth=0)
        gains = [case.gain(size, context, NUM_DRAFTS) for size in sizes]
        axes.plot(sizes, gains, color=color, label=f"{context:,} tokens, K = {NUM_DRAFTS}")
        best = [case.best_gain(size, context, head_share=DRAFT_VOCAB)[0] for size in sizes]
        label = f"{context:,} tokens, best K, a quarter of the head"
        axes.plot(sizes, best, color=color, linestyle="--", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    axes.minorticks_off()
    axes.set_xlabel("requests at once", color=MUTED, fontsize=10)
    hint = "times plain; band: {:.0f} to {:.0f} % of peak FLOP/s".format(
        *(100 * s for s in FLOP_SHARES)
    )
    style_axes(axes, case.name, hint)


def _with_flop_share(case: Case, share: float) -> Case:
    device = case.model.device
    rate = device.flops_per_s / FLOP_SHARE * share
    return replace(case, model=replace(case.model, device=replace(device, flops_per_s=rate)))
