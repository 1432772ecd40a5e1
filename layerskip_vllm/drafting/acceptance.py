"""How many of its drafts each request gets accepted, by what it got lately.

Part of `draft_lengths`: in the engine core, plain Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, repeat
from operator import mul

# What is thought before anything was drafted: enough for drafting to be tried, if it is cheap.
_FIRST_GUESS = 0.6
_FIRST_WEIGHT = 6.0  # in drafts
# A request is thought to be as all were lately until it has shown more than so many drafts.
_WEIGHT_OF_ALL = 6.0
# Drafts after which an old one counts e times less.
_MEMORY = 64.0
_MEMORY_OF_ALL = 256.0
# After so many steps without a draft, what was before counts as so many drafts at most.
_GAP = 16
_WEIGHT_AFTER_GAP = 4.0


@dataclass(frozen=True)
class DraftResult:
    """What became of the drafts that a request brought to a step."""

    num_drafts: int
    num_accepted: int


@dataclass
class _Record:
    """Drafts that were judged, the refused one that ends a run included, old ones less and less."""

    memory: float
    num_judged: float = 0.0
    num_accepted: float = 0.0
    last_step: int = 0

    def add(self, result: DraftResult, step: int) -> None:
        num_judged = min(result.num_drafts, result.num_accepted + 1)
        kept = (1 - 1 / self.memory) ** num_judged
        if step - self.last_step > _GAP:
            kept *= _WEIGHT_AFTER_GAP / max(self.num_judged, _WEIGHT_AFTER_GAP)
        self.num_judged = self.num_judged * kept + num_judged
        self.num_accepted = self.num_accepted * kept + result.num_accepted
        self.last_step = step


class RequestAcceptance:
    """The chance that a request's next draft is accepted after all before it were.

    It is taken to be the same at each position of a draft: drafts run over the target's own keys
    and values, so that they do not get worse with the distance from the last verified token as
    those of a draft head do.
    """

    def __init__(self, max_num_drafts: int) -> None:
        """Know nothing but the first guess."""
        self._max_num_drafts = max_num_drafts
        self._num_steps = 0
        self._all = _Record(_MEMORY_OF_ALL, _FIRST_WEIGHT, _FIRST_WEIGHT * _FIRST_GUESS)
        self._by_request: dict[str, _Record] = {}
        # What `expected_tokens` adds up, kept between steps.
        self._expected: dict[str, list[float]] = {}

    def observe(self, results: Mapping[str, DraftResult]) -> None:
        """Take in what became of a step's drafts, by request."""
        self._num_steps += 1
        for request_id, result in results.items():
            if result.num_drafts > 0:
                record = self._by_request.setdefault(request_id, _Record(_MEMORY))
                for each in (self._all, record):
                    each.add(result, self._num_steps)
                self._expected.pop(request_id, None)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop requests that have ended."""
        for request_id in request_ids:
            self._by_request.pop(request_id, None)
            self._expected.pop(request_id, None)

    def expected_tokens(self, limits: Mapping[str, int]) -> list[float]:
        """Add up what a verification is expected to yield.

        Args:
            limits: The requests of the batch, and how many tokens each drafts at most.

        Returns:
            Tokens of the whole batch by the number of drafts, 0 to the most that there can be.
        """
        rows = []
        for request_id, limit in limits.items():
            row = self._expected.get(request_id)
            if row is None:
                row = self._expected[request_id] = self._expect(request_id)
            if limit < self._max_num_drafts:
                row = row[: limit + 1] + [row[limit]] * (self._max_num_drafts - limit)
            rows.append(row)
        return [sum(column) for column in zip(*rows, strict=True)]

    def _expect(self, request_id: str) -> list[float]:
        chance = self._all.num_accepted / self._all.num_judged
        record = self._by_request.get(request_id)
        if record is not None:
            own = record.num_accepted + _WEIGHT_OF_ALL * chance
            chance = own / (record.num_judged + _WEIGHT_OF_ALL)
        # The target's own token, and each draft that is reached and accepted.
        return list(accumulate(accumulate(repeat(chance, self._max_num_drafts), mul, initial=1.0)))
