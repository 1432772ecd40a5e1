"""Draws what `layerskip-vllm tune` has weighed as one PNG: what was predicted, and the trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layerskip_vllm.tools.chart_style import INK, LAYERSKIP, MUTED, PLAIN, TRACK, WRONG, style_axes
from layerskip_vllm.tools.speedup_map import draw_speedup_map
from layerskip_vllm.tools.tune.designs import Design, Speedups
from layerskip_vllm.tools.tune.tune_report import TuneReport
from layerskip_vllm.tools.tune.tuning import LONGEST_DRAFT

_WIDTH = 12.0  # inches, as all below
_MARGIN = 0.72
_LABELS = 2.9  # names of designs
_ROW = 0.3
_HEAD = 1.25
_MAP = 3.0
_GAP = 1.05
_FOOT = 0.6


class _Page:
    """Places axes from the top down."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(_WIDTH, height), dpi=150, facecolor="white")
        self._height = height
        self._top = _HEAD

    def add_row(self, height: float, left: float, num_axes: int = 1) -> list[Axes]:
        """Add axes side by side, of a height, below those that are there."""
        self._top += _GAP / 2
        width = (_WIDTH - left - 0.2) / num_axes
        bottom = 1 - (self._top + height) / self._height
        row = [
            self.figure.add_axes(
                (
                    (left + number * width) / _WIDTH,
                    bottom,
                    (width - 0.4) / _WIDTH,
                    height / self._height,
                )
            )
            for number in range(num_axes)
        ]
        self._top += height + _GAP / 2
        return row

    def write(self, from_top: float, words: str, size: float, color: str, bold: bool) -> None:
        """Write a line of text."""
        self.figure.text(
            _MARGIN / _WIDTH,
            1 - from_top / self._height,
            words,
            fontsize=size,
            fontweight="bold" if bold else "normal",
            color=color,
            va="center",
        )


def draw_tuning(path: Path, report: TuneReport) -> None:
    """Write the picture to a `.png` file."""
    make_tuning_figure(report).savefig(path)


def make_tuning_figure(report: TuneReport) -> Figure:
    """Return the picture: speeds by E and K, the best of each kind, and what was tried."""
    outcome = report.tuning.outcome
    kinds = _best_of_kinds(report.tuning.predictions)
    num_rows = len(outcome.trials) + (outcome.auto is not None)
    height = _HEAD + _MAP + _ROW * (len(kinds) + num_rows) + 3 * _GAP + _FOOT
    page = _Page(height)
    color = LAYERSKIP if outcome.pays else WRONG
    name, _, gain = report.describe().rpartition(": ")
    page.write(0.42, name, 18, INK, bold=True)
    page.write(0.85, gain, 12.5, color, bold=False)
    _draw_map(page.add_row(_MAP, _MARGIN)[0], report)
    _draw_kinds(page.add_row(_ROW * len(kinds), _LABELS)[0], kinds)
    _draw_trials(page.add_row(_ROW * num_rows, _LABELS, len(outcome.speedups)), report)
    page.write(height - 0.35, report.describe_run(), 9.5, MUTED, bold=False)
    return page.figure


def _best_of_kinds(predictions: Sequence[Speedups]) -> list[Speedups]:
    """Return the best prediction of each kind of design, best first."""
    best: dict[object, Speedups] = {}
    for prediction in sorted(predictions, key=lambda each: -each.score):
        best.setdefault(prediction.design.kind, prediction)
    return list(best.values())


def _draw_map(axes: Axes, report: TuneReport) -> None:
    best = report.tuning.outcome.best
    alike = [p for p in report.tuning.predictions if p.design.kind == best.design.kind]
    speedups = [
        [prediction.score_of(k) for k in range(1, LONGEST_DRAFT + 1)]
        for prediction in sorted(alike, key=lambda each: each.design.exit_layer)
    ]
    draw_speedup_map(axes, speedups, (best.design.exit_layer, best.measured.length))
    sizes = ", ".join(map(str, best.measured.batch_sizes))
    style_axes(
        axes,
        f"Predicted: by E and K{_name_kind(best.design, ', with ')}",
        f"times plain vLLM, the mean over batches of {sizes}; the box is what was fastest",
    )
    axes.set_xlabel("exit after layer", color=MUTED, fontsize=10)


def _draw_kinds(axes: Axes, kinds: list[Speedups]) -> None:
    rows = range(len(kinds))
    scores = [kind.score for kind in kinds]
    axes.barh(rows, scores, height=0.62, color=[LAYERSKIP, *[PLAIN] * (len(kinds) - 1)])
    for row, kind in zip(rows, kinds, strict=True):
        words = f"{kind.score:.2f}   E = {kind.design.exit_layer}, K = {_span(kind.lengths)}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line of plain
        axes.text(kind.score + 0.01, row, words, va="center", fontsize=9, color=INK, bbox=box)
    axes.set_xlim(0, 1.25 * max(scores))
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    _label_rows(axes, [_name_kind(kind.design, "") or "the exit alone" for kind in kinds])
    style_axes(
        axes, "Predicted: the best of each kind", "times plain vLLM, with the best K of each"
    )


def _draw_trials(row: list[Axes], report: TuneReport) -> None:
    outcome = report.tuning.outcome
    names = [trial.design.describe() for trial in outcome.trials]
    if outcome.auto is not None:
        names.append("the fastest, with K auto")
    fastest = len(names) - 1 if outcome.is_auto else outcome.trials.index(outcome.best)
    for axes, size in zip(row, outcome.speedups, strict=True):
        axes.axhspan(fastest - 0.5, fastest + 0.5, color=TRACK, zorder=0)
        axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for number, trial in enumerate(outcome.trials):
            k = trial.lengths[size]
            predicted = trial.predicted.by_load[size, k]
            measured = trial.measured.by_load[size, k]
            axes.plot([predicted, measured], [number] * 2, color=PLAIN, linewidth=1.5, zorder=2)
            axes.plot(predicted, number, "o", color="white", markeredgecolor=LAYERSKIP, zorder=3)
            axes.plot(measured, number, "o", color=LAYERSKIP, zorder=4)
            _write_beside(axes, max(predicted, measured), number, f"{measured:.2f}  K = {k}")
        if outcome.auto is not None:
            axes.plot(outcome.auto[size], len(names) - 1, "o", color=LAYERSKIP, zorder=4)
            _write_beside(axes, outcome.auto[size], len(names) - 1, f"{outcome.auto[size]:.2f}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.6 * (right - left))  # room for the words
        _label_rows(axes, names if axes is row[0] else [""] * len(names))
        style_axes(axes, f"Tried: {size} at once", "filled: measured; hollow: predicted")


def _span(lengths: Mapping[int, int]) -> str:
    """Say which K there are: one, or from the least to the most."""
    least, most = min(lengths.values()), max(lengths.values())
    return str(least) if least == most else f"{least} to {most}"


def _write_beside(axes: Axes, x: float, y: float, words: str) -> None:
    axes.annotate(
        words, (x, y), (8, 0), textcoords="offset points", va="center", fontsize=9, color=INK
    )


def _label_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _name_kind(design: Design, before: str) -> str:
    """Name what a design has beside E, with words before it; nothing if it has no more."""
    _, _, rest = design.describe().partition(", ")
    return before + rest if rest else ""
