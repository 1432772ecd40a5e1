"""vLLM's counters of speculative decoding, read from a server's Prometheus endpoint `/metrics`."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "vllm:spec_decode_num_"


@dataclass(frozen=True)
class SpecDecodeCounters:
    """How much was drafted and accepted, summed over the server's engines.

    Attributes:
        num_drafts: How often a request was given a draft.
        num_draft_tokens: Tokens drafted.
        num_accepted_tokens: Tokens drafted and accepted.
        num_accepted_tokens_per_pos: The accepted ones by their position in the draft, first at 0.
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]

    def __sub__(self, earlier: SpecDecodeCounters) -> SpecDecodeCounters:
        """Returns what was counted since `earlier`."""
        return SpecDecodeCounters(
            self.num_drafts - earlier.num_drafts,
            self.num_draft_tokens - earlier.num_draft_tokens,
            self.num_accepted_tokens - earlier.num_accepted_tokens,
            tuple(
                now - before
                for now, before in zip(
                    self.num_accepted_tokens_per_pos,
                    earlier.num_accepted_tokens_per_pos,
                    strict=True,
                )
            ),
        )

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """The share of drafts accepted up to and including each position, 0 to 1."""
        return tuple(accepted / self.num_drafts for accepted in self.num_accepted_tokens_per_pos)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that a verification yields: the accepted ones and the target's own."""
        return 1 + self.num_accepted_tokens / self.num_drafts


def parse_spec_decode_counters(metrics_text: str) -> SpecDecodeCounters:
    """Finds the counters in a server's answer to `GET /metrics`.

    Args:
        metrics_text: The answer, in Prometheus' text format.

    Returns:
        The counters since the server's start.

    Raises:
        ValueError: If it has no such counters, as that of a server without speculative decoding.
    """
    totals: dict[str, float] = {}
    by_position: dict[int, float] = {}
    for family in text_string_to_metric_families(metrics_text):
        for sample in family.samples:
            if not (sample.name.startswith(_PREFIX) and sample.name.endswith("_total")):
                continue
            name = sample.name.removeprefix(_PREFIX).removesuffix("_total")
            if name == "accepted_tokens_per_pos":
                position = int(sample.labels["position"])
                by_position[position] = by_position.get(position, 0) + sample.value
            else:
                totals[name] = totals.get(name, 0) + sample.value
    missing = {"drafts", "draft_tokens", "accepted_tokens"} - totals.keys()
    if missing:
        raise ValueError(
            f"/metrics has no {_PREFIX}{min(missing)}_total: this server does no speculative "
            "decoding. Was it started with --speculative-model=layerskip, and the plugin loaded?"
        )
    return SpecDecodeCounters(
        num_drafts=int(totals["drafts"]),
        num_draft_tokens=int(totals["draft_tokens"]),
        num_accepted_tokens=int(totals["accepted_tokens"]),
        num_accepted_tokens_per_pos=tuple(int(by_position[pos]) for pos in sorted(by_position)),
    )
