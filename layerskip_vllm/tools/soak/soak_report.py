"""A soak's table for the terminal, and its JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from layerskip_vllm.tools.soak.client import End, Outcome, Row
from layerskip_vllm.tools.soak.command import SoakConfig
from layerskip_vllm.tools.soak.run import Soak

_MAX_FAULTS_SHOWN = 10
_MAX_PAYLOAD_CHARACTERS = 4000


def print_soak(soak: Soak, console: Console) -> None:
    """Print a table of the requests, the first faults, and what was checked."""
    console.print(_build_table(soak))
    for fault in soak.tally.faults[:_MAX_FAULTS_SHOWN]:
        request = fault.request
        words = f"{request.kind} ({request.detail}), {fault.seconds:.1f} s: {fault.reason}"
        console.print(words, markup=False, soft_wrap=True, style="red")
    marks = {True: "[green]ok[/]   ", False: "[red]FAULT[/]"}
    for check in soak.checks:
        console.print(f"{marks[check.is_passed]} {check.name}: {check.detail}", soft_wrap=True)


def _build_table(soak: Soak) -> Table:
    ends = [end.value for end in End]
    heads = ["", "sent", *ends, "tokens", "same as plain", "slowest"]
    title = f"{soak.service.model} at {soak.service.url}, {soak.seconds / 60:.1f} minutes"
    table = Table(title=title + (", interrupted" if soak.is_interrupted else ""))
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for kind, row in sorted(soak.tally.rows.items()):
        table.add_row(kind, *_cells(row))
    table.add_section()
    table.add_row("all", *_cells(soak.tally.total))
    return table


def soak_to_json(soak: Soak) -> dict[str, Any]:
    """Return everything that a soak found as a JSON object, each fault with its request."""
    return {
        "url": soak.service.url,
        "model": soak.service.model,
        "max_model_len": soak.service.max_model_len,
        "num_speculative_tokens": soak.service.num_speculative_tokens,
        "config": soak.config.model_dump(include=set(SoakConfig.model_fields)),
        "seconds": soak.seconds,
        "is_interrupted": soak.is_interrupted,
        "is_passed": soak.is_passed,
        "requests": {kind: _row(row) for kind, row in sorted(soak.tally.rows.items())},
        "total": _row(soak.tally.total),
        "checks": [asdict(check) for check in soak.checks],
        "faults": [_fault(fault) for fault in soak.tally.faults],
        "looks": [
            {
                "seconds": look.seconds,
                "num_running": look.load[0],
                "num_waiting": look.load[1],
                "kv_cache_usage": look.load[2],
                "num_preemptions": look.sample.values.get("vllm:num_preemptions_total", 0),
                "memory_mib": look.memory_mib,
            }
            for look in soak.looks
        ],
    }


def _cells(row: Row) -> list[str]:
    counts = [row.num_sent, *(row.ends[end] for end in End), row.num_tokens, row.num_compared]
    return [*(f"{count:,}" for count in counts), f"{row.longest_s:.1f} s"]


def _row(row: Row) -> dict[str, Any]:
    return {
        "sent": row.num_sent,
        **{end.value: row.ends[end] for end in End},
        "lost": row.num_lost,
        "tokens": row.num_tokens,
        "tokens_compared": row.num_compared,
        "longest_s": row.longest_s,
    }


def _fault(fault: Outcome) -> dict[str, Any]:
    payload = fault.request.payload.decode(errors="backslashreplace")
    return {
        "kind": fault.request.kind,
        "detail": fault.request.detail,
        "seconds": fault.seconds,
        "reason": fault.reason,
        "path": fault.request.path,
        "payload": payload[:_MAX_PAYLOAD_CHARACTERS],
        "num_payload_characters": len(payload),
    }
