"""Draws an interval for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from layerskip_vllm.tools.server.metrics import Interval, SpecDecodeCounters
from layerskip_vllm.tools.speedup_bound import bound_speedup

BAR_WIDTH = 30


def draw(
    url: str, now: Interval, since_start: Interval | None, draft_share: float | None
) -> RenderableType:
    """Draws what a server does.

    Args:
        url: The server's address.
        now: The last interval.
        since_start: Since watching began, if that is longer.
        draft_share: What a draft step reads, as a share of what a step of the whole model does;
            None if it is not known, and with it the bound on the speed-up.

    Returns:
        A panel.
    """
    columns = [now] if since_start is None else [now, since_start]
    heading = [f"last {interval.seconds:.0f} s" for interval in columns]
    table = Table("", *heading, box=None, pad_edge=False)
    for name, show in _ROWS:
        table.add_row(name, *(show(interval) for interval in columns))
    table.add_row("accepted of drafted", *(_show_acceptance(i.drafting) for i in columns))
    table.add_row("mean acceptance length", *(_show_length(i.drafting) for i in columns))
    table.add_row("bound on speed-up", *(_show_bound(i.drafting, draft_share) for i in columns))
    parts: list[RenderableType] = [table]
    drafting = next((i.drafting for i in columns if i.drafting is not None), None)
    parts += [Text(), _draw_positions(drafting) if drafting else Text("nothing drafted yet")]
    return Panel(Group(*parts), title=f"layerskip on {url}", expand=False)


_ROWS: tuple[tuple[str, Callable[[Interval], str]], ...] = (
    ("output tokens a second", lambda i: f"{i.tokens_per_s:.1f}"),
    ("requests running, waiting", lambda i: f"{i.end.num_running}, {i.end.num_waiting}"),
    ("KV cache in use", lambda i: f"{i.end.kv_cache_usage:.0%}"),
    ("time to first token", lambda i: _show_ms(i.time_to_first_token_s)),
    ("time between outputs", lambda i: _show_ms(i.inter_token_latency_s)),
)


def _show_ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def _show_acceptance(drafting: SpecDecodeCounters | None) -> str:
    if drafting is None:
        return "-"
    return f"{drafting.acceptance_rate:.0%}"


def _show_length(drafting: SpecDecodeCounters | None) -> str:
    return "-" if drafting is None else f"{drafting.mean_acceptance_length:.2f}"


def _show_bound(drafting: SpecDecodeCounters | None, draft_share: float | None) -> str:
    """By bytes read, with the mean K of the drafts: requests may draft less than the server's."""
    if drafting is None or draft_share is None:
        return "-"
    num_speculative_tokens = drafting.num_draft_tokens / drafting.num_drafts
    accepted = drafting.num_accepted_tokens / drafting.num_drafts
    return f"{bound_speedup(draft_share, num_speculative_tokens, accepted):.2f}"


def _draw_positions(drafting: SpecDecodeCounters) -> Table:
    table = Table("position", "accepted", "", box=None, pad_edge=False)
    for position, share in enumerate(drafting.acceptance_by_position, start=1):
        bar: Any = Text("█" * round(BAR_WIDTH * share), style="green")
        table.add_row(str(position), f"{share:.0%}", bar)
    return table
