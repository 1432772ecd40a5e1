"""The report of `benchmarks.bench`: Markdown, where layerskip loses first, and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from layerskip_vllm.tools.chart_style import INK, LAYERSKIP, MUTED, style_axes

_CELL = re.compile(r"layerskip\+E(\d+)\+K(\d+)")


def write_report(studies: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write the report.

    Args:
        studies: What `benchmarks.bench` has written of each, by name.
        path: The Markdown file; the pictures lie beside it.
    """
    lines = ["# layerskip and its peers", ""]
    for name, study in studies.items():
        lines += [f"## {study['title']}", "", f"    {study['command']}", ""]
        versions = ", ".join(f"{package} {v}" for package, v in study["versions"].items())
        lines += [
            f"{study['hardware']}; {versions}; revision {study['revision']}, {study['date']}.",
            "",
        ]
        if "served" in study:
            lines += [*_tell_served_losses(study["served"]), ""]
            lines += _tabulate_served(study["served"])
            continue
        lines += [*study["conditions"], ""]
        lines += [*_tell_losses(study["summary"]), ""]
        lines += _tabulate(study)
        pictures = ["grid"] if name == "grid" else [name, f"{name}-memory"]
        lines += [f"![{picture}]({picture}.png)" for picture in pictures] + [""]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _tell_losses(summary: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each load at which a peer is faster than layerskip as it ships."""
    loads = {tuple(line["load"].values()) for line in summary}
    has_lost = False
    for batch_size, num_prompt_tokens in sorted(loads):
        lines = {
            line["system"]: line["tokens_per_s"]
            for line in summary
            if tuple(line["load"].values()) == (batch_size, num_prompt_tokens)
        }
        own = lines.get("layerskip")
        if own is None:
            continue
        faster = {
            system: speed / own
            for system, speed in lines.items()
            if not system.startswith("layerskip") and speed > own
        }
        for system, ratio in sorted(faster.items(), key=lambda item: -item[1]):
            has_lost = True
            yield f"- layerskip loses at batch {batch_size}: {system} is {ratio:.2f} times as fast."
    if not has_lost and any(line["system"] == "layerskip" for line in summary):
        yield "- layerskip is the fastest at every batch size."


def _tabulate(study: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of an offline study."""
    headings = (
        *("batch", "system", "tokens/s", "(range)", "vs plain", "accepted", "by position"),
        *("first token, ms", "per token, ms", "p99", "same tokens", "peak GiB", "KV tokens"),
    )
    yield _row(headings)
    yield _row("---" for _ in headings)
    for line in study["summary"]:
        facts = study["engines"][line["system"]]
        yield _row(
            (
                line["load"]["batch_size"],
                line["system"],
                f"{line['tokens_per_s']:.1f}",
                f"{line['slowest']:.1f}-{line['fastest']:.1f}",
                _show(line["speedup"], ".2f"),
                _show(line["accepted"], ".2f") + _show(line["drafted"], ".3g", " of "),
                " ".join(f"{share:.2f}" for share in line["accepted_by_position"]),
                f"{line['prefill_s'] * 1e3:.0f}",
                _show_ms(line["tpot_s"]),
                _show_ms(line["tpot_p99_s"]),
                _show(line["same_tokens"], ".0%"),
                f"{facts['peak_memory_bytes'] / 2**30:.2f}",
                f"{facts['num_kv_tokens']:,}",
            )
        )
    yield ""


def _tell_served_losses(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each load at which layerskip as it ships is slower than plain vLLM."""
    speeds = {
        (line["dataset"], line["num_clients"], line["system"]): line["result"]["output_throughput"]
        for line in results
    }
    for (dataset, num_clients, system), own in speeds.items():
        plain = speeds[dataset, num_clients, "plain"]
        if system == "layerskip" and own < plain:
            yield (
                f"- layerskip loses with {num_clients} clients on {dataset}: "
                f"{own / plain:.2f} times plain."
            )


def _tabulate_served(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table of servers."""
    headings = (
        *("data set", "clients", "system", "tokens/s", "vs plain", "first token, ms", "p99"),
        *("per token, ms", "p99", "accepted, %"),
    )
    yield _row(headings)
    yield _row("---" for _ in headings)
    plain = {
        (line["dataset"], line["num_clients"]): line["result"]["output_throughput"]
        for line in results
        if line["system"] == "plain"
    }
    for line in results:
        figures = line["result"]
        throughput = figures["output_throughput"]
        yield _row(
            (
                line["dataset"],
                line["num_clients"],
                line["system"],
                f"{throughput:.1f}",
                f"{throughput / plain[line['dataset'], line['num_clients']]:.2f}",
                f"{figures['median_ttft_ms']:.1f}",
                f"{figures['p99_ttft_ms']:.1f}",
                f"{figures['median_tpot_ms']:.2f}",
                f"{figures['p99_tpot_ms']:.2f}",
                _show(figures["spec_decode_acceptance_rate"], ".0f"),
            )
        )
    yield ""


def _row(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _show(value: float | None, form: str, before: str = "") -> str:
    return "" if value is None else before + format(value, form)


def _show_ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def draw_grid(study: Mapping[str, Any]) -> Figure:
    """Return a heat map of the speed-up over plain vLLM by E and K."""
    cells = {
        (int(match[1]), int(match[2])): line["speedup"]
        for line in study["summary"]
        if (match := _CELL.fullmatch(line["system"]))
    }
    exit_layers = sorted({exit_layer for exit_layer, _ in cells})
    lengths = sorted({k for _, k in cells})
    values = [[cells[exit_layer, k] for k in lengths] for exit_layer in exit_layers]
    figure = Figure(figsize=(6.0, 5.0), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="YlGn", origin="lower", aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=INK, fontsize=10)
    axes.set_xticks(range(len(lengths)), [f"K = {k}" for k in lengths])
    axes.set_yticks(range(len(exit_layers)), [f"E = {e}" for e in exit_layers])
    style_axes(axes, "Times plain vLLM, by E and K", study["title"])
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.supxlabel(study["hardware"], color=MUTED, fontsize=9)
    return figure


def draw_memory(study: Mapping[str, Any]) -> Figure:
    """Return a chart of the peak memory of each system."""
    systems = list(study["engines"])[::-1]
    peaks = [study["engines"][system]["peak_memory_bytes"] / 2**30 for system in systems]
    figure = Figure(figsize=(7.0, 0.4 * len(systems) + 1.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    colors = [LAYERSKIP if system.startswith("layerskip") else MUTED for system in systems]
    bars = axes.barh(systems, peaks, color=colors)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9, color=INK)
    axes.margins(x=0.12)
    style_axes(axes, "Peak memory of the engine's process, GiB", study["title"])
    figure.supxlabel(study["hardware"], color=MUTED, fontsize=9)
    return figure
