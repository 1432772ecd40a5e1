"""Draws what a server does for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from layerskip_vllm.tools.server.metrics import Interval, LayerSkipInfo, SpecDecodeCounters
from layerskip_vllm.tools.speedup_bound import bound_speedup

BAR_WIDTH = 30


def draw(url: str, intervals: Sequence[Interval], draft_share: float | None) -> RenderableType:
    """Draw what a server does: the last interval, and that since watching began, if it is longer.

    `draft_share` is what a draft step reads as a share of what a step of the target does; None if
    it is not known, and with it the bound on the speed-up.
    """
    heading = [f"last {interval.seconds:.0f} s" for interval in intervals]
    table = Table("", *heading, box=None, pad_edge=False)
    for name, show in _ROWS:
        table.add_row(name, *map(show, intervals))
    drafts = [interval.drafting for interval in intervals]
    table.add_row("bound on speed-up", *(_show_bound(each, draft_share) for each in drafts))
    drafting = next(filter(None, drafts), None)
    positions = _draw_positions(drafting) if drafting else Text("nothing drafted yet")
    parts: list[RenderableType] = [table, Text(), positions]
    if (info := intervals[0].end.info) is not None:
        parts.insert(0, Text(_describe_info(info)))
    return Panel(Group(*parts), title=f"layerskip on {url}", expand=False)


def _describe_info(info: LayerSkipInfo) -> str:
    lookup = "" if info.lookup == "off" else ", copied where the text repeats"
    adapter = f"\nexit adapter {info.exit_adapter}" if info.exit_adapter else ""
    most = "up to " if info.is_length_auto else ""
    return (
        f"layers [0, {info.exit_layer}) of {info.num_layers} draft {most}"
        f"{info.num_speculative_tokens} tokens of {info.draft_vocab_size:,}{lookup}{adapter}\n"
        f"E is from {info.exit_layer_source}, K from {info.num_speculative_tokens_source}\n"
    )


_ROWS: tuple[tuple[str, Callable[[Interval], str]], ...] = (
    ("output tokens a second", lambda i: f"{i.tokens_per_s:.1f}"),
    ("requests running, waiting", lambda i: f"{i.end.num_running}, {i.end.num_waiting}"),
    ("KV cache in use", lambda i: f"{i.end.kv_cache_usage:.0%}"),
    ("time to first token", lambda i: _show_ms(i.time_to_first_token_s)),
    ("time between outputs", lambda i: _show_ms(i.inter_token_latency_s)),
    ("accepted of drafted", lambda i: f"{i.drafting.acceptance_rate:.0%}" if i.drafting else "-"),
    (
        "mean acceptance length",
        lambda i: f"{i.drafting.mean_acceptance_length:.2f}" if i.drafting else "-",
    ),
)


def _show_ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


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
        bar = Text("█" * round(BAR_WIDTH * share), style="green")
        table.add_row(str(position), f"{share:.0%}", bar)
    return table
