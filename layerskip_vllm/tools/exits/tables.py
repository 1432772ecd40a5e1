"""The tables that `layerskip-vllm exits` prints."""

from __future__ import annotations

from rich.table import Table

from layerskip_vllm.tools.exits.exit_report import Draft, ExitReport


def build_exit_table(report: ExitReport) -> Table:
    """Lay the exits out, one a line with the K that promises most, the best one marked."""
    table = Table(
        title="Every exit on held-out text, with its best K",
        caption=f"{report.describe_run()}; the speed-up is the most that the bytes read allow",
        caption_justify="left",
    )
    headings = ("E", "loss", "perplexity", "agrees", "a draft reads", "K", "accepted", "speed-up")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for exit_ in report.exits:
        table.add_row(
            str(exit_.exit_layer),
            f"{exit_.loss:.3f}",
            f"{exit_.perplexity:,.1f}",
            f"{exit_.agreement:.0%}",
            f"{exit_.draft_share:.0%}",
            *_describe_draft(exit_.best),
            style="bold green" if report.pays and exit_.best == report.best else None,
        )
    return table


def _describe_draft(draft: Draft | None) -> tuple[str, str, str]:
    if draft is None:
        return "-", "-", "-"
    rate, speedup = f"{draft.acceptance.rate:.0%}", f"{draft.speedup:.2f}"
    return str(draft.num_speculative_tokens), rate, speedup


def build_speedup_table(report: ExitReport) -> Table:
    """Lay the speed-ups out by E and K with the drafts accepted; those above 1 are green."""
    table = Table(title="Speed-up and share of drafts accepted, by E and K")
    table.add_column("E", justify="right", no_wrap=True)
    for draft in report.exits[0].drafts:
        table.add_column(f"K = {draft.num_speculative_tokens}", justify="right", no_wrap=True)
    for exit_ in report.exits[:-1]:
        cells = []
        for draft in exit_.drafts:
            text = f"{draft.speedup:.2f} {draft.acceptance.rate:>4.0%}"
            style = "bold green" if draft == report.best else "green"
            cells.append(f"[{style}]{text}[/]" if draft.speedup > 1 else text)
        table.add_row(str(exit_.exit_layer), *cells)
    return table
