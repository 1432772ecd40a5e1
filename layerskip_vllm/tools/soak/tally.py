"""Counts of requests by kind and by how they ended, and the faults among them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from layerskip_vllm.tools.soak.client import End, Outcome


@dataclass
class Row:
    """Requests of one kind."""

    num_sent: int = 0  # begun
    ends: Counter[End] = field(default_factory=Counter)
    num_tokens: int = 0
    num_compared: int = 0  # tokens compared with plain vLLM's, and equal
    longest_s: float = 0.0

    @property
    def num_lost(self) -> int:
        """Requests without any end."""
        return self.num_sent - sum(self.ends.values())


@dataclass
class Tally:
    """All requests of a run."""

    rows: dict[str, Row] = field(default_factory=dict)  # by kind
    total: Row = field(default_factory=Row)
    faults: list[Outcome] = field(default_factory=list)  # in order

    def begin(self, kind: str) -> None:
        """Count a request that is about to be sent."""
        for row in (self.rows.setdefault(kind, Row()), self.total):
            row.num_sent += 1

    def end(self, outcome: Outcome) -> None:
        """Count a request's end."""
        for row in (self.rows[outcome.request.kind], self.total):
            row.ends[outcome.end] += 1
            row.num_tokens += outcome.num_tokens
            row.num_compared += outcome.num_compared
            row.longest_s = max(row.longest_s, outcome.seconds)
        if outcome.end is End.FAULT:
            self.faults.append(outcome)
