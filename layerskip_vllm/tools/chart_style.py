"""The colours and axes of all pictures, `layerskip-vllm exits`' and the benchmarks'."""

from __future__ import annotations

from matplotlib.axes import Axes

INK = "#1f2933"
MUTED = "#7b8794"
PLAIN = "#b8c1cc"
LAYERSKIP = "#0f766e"
TRACK = "#eef1f4"
WRONG = "#b42318"


def style_axes(axes: Axes, title: str, hint: str) -> None:
    """Give axes a title with a hint below it, and leave only the bottom line."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    axes.annotate(
        hint, (0, 1), (0, 7), "axes fraction", textcoords="offset points", fontsize=10, color=MUTED
    )
    axes.tick_params(length=0, labelsize=10, labelcolor=INK, labelbottom=True)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(PLAIN)
