"""A map of speed-ups by E and K, in the pictures of `exits` and `tune`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from layerskip_vllm.tools.chart_style import INK, LAYERSKIP, MUTED

# Slower than plain decoding is grey, as fast is white, faster is green.
_COLORS = LinearSegmentedColormap.from_list("speedup", ["#9aa5b1", "#ffffff", LAYERSKIP])


def draw_speedup_map(
    axes: Axes, speedups: Sequence[Sequence[float]], best: tuple[int, int]
) -> None:
    """Draw speed-ups, by exit layer and K, both from 1, with a box around the best E and K."""
    num_exits, num_lengths = len(speedups), len(speedups[0])
    highest = max(max(map(max, speedups)), 1.01)
    lowest = min(min(map(min, speedups)), 0.99)
    axes.imshow(
        list(zip(*speedups, strict=True)),
        cmap=_COLORS,
        norm=TwoSlopeNorm(1, vmin=lowest, vmax=highest),
        extent=(0.5, num_exits + 0.5, num_lengths + 0.5, 0.5),
        aspect="auto",
    )
    axes.invert_yaxis()
    if num_exits < 40 and num_lengths <= 12:
        _write_speedups(axes, speedups, best, highest)
    corner = (best[0] - 0.5, best[1] - 0.5)
    box = Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=2.5, zorder=3, clip_on=False)
    axes.add_patch(box)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=26, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.set_ylabel("tokens in a draft", color=MUTED, fontsize=10)


def _write_speedups(
    axes: Axes, speedups: Sequence[Sequence[float]], best: tuple[int, int], highest: float
) -> None:
    size = 8.5 if len(speedups) < 28 else 6.5
    for exit_layer, row in enumerate(speedups, start=1):
        for k, speedup in enumerate(row, start=1):
            axes.text(
                exit_layer,
                k,
                f"{speedup:.2f}",
                ha="center",
                va="center",
                fontsize=size,
                fontweight="bold" if (exit_layer, k) == best else "normal",
                color="white" if speedup > 1 + 0.6 * (highest - 1) else INK,
            )
