"""What must hold after a soak."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from layerskip_vllm.tools.server.metrics import is_restarted
from layerskip_vllm.tools.soak.client import End, Tally
from layerskip_vllm.tools.soak.monitor import Look, measure_growth_mib


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    is_passed: bool
    detail: str  # what was seen


def check_all(
    tally: Tally, looks: Sequence[Look], is_idle: bool, is_healthy: bool, max_growth_mib: float
) -> list[Check]:
    """Check a run, whose last look is after all traffic; memory only where it was looked at."""
    checks = [
        _check_requests(tally),
        Check("server is healthy", is_healthy, "/health answers 200" if is_healthy else "no 200"),
        _check_idle(looks[-1], is_idle),
        _check_drafts(tally, looks),
    ]
    if any(look.memory_mib is not None for look in looks):
        checks.append(_check_memory(looks, max_growth_mib))
    return checks


def _check_requests(tally: Tally) -> Check:
    total = tally.total
    detail = ", ".join(f"{total.ends[end]:,} {end.value}" for end in End)
    return Check(
        "each request ended as it must",
        total.num_sent > 0 and total.num_lost == 0 and not tally.faults,
        f"{total.num_sent:,} sent: {detail}, {total.num_lost:,} lost",
    )


def _check_idle(look: Look, is_idle: bool) -> Check:
    num_running, num_waiting, usage = look.load
    detail = f"{num_running} running, {num_waiting} waiting, {usage:.2%} of the KV cache in use"
    return Check("no request and no KV block is left", is_idle, detail)


def _check_drafts(tally: Tally, looks: Sequence[Look]) -> Check:
    name = "the same server drafted all the time"
    if any(is_restarted(a.sample, b.sample) for a, b in itertools.pairwise(looks)):
        return Check(name, False, "its counters went back: it was started anew")
    drafting = looks[-1].sample.drafting - looks[0].sample.drafting
    return Check(
        name,
        drafting.num_drafts > 0 or not tally.total.num_tokens,
        f"{drafting.num_draft_tokens:,} tokens drafted, {drafting.num_accepted_tokens:,} accepted",
    )


def _check_memory(looks: Sequence[Look], max_growth_mib: float) -> Check:
    name, growth = "memory is flat", measure_growth_mib(looks)
    if growth is None:
        return Check(name, False, f"{len(looks)} looks are too few; run for longer")
    last = looks[-1].memory_mib or 0.0
    return Check(
        name,
        growth <= max_growth_mib,
        f"{growth:+.1f} MiB once warm, to {last:,.0f} MiB; at most {max_growth_mib:g} MiB",
    )
