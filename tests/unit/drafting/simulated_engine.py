"""An engine whose steps take given times and whose drafts are accepted at given rates."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from layerskip_vllm.drafting.acceptance import DraftResult
from layerskip_vllm.drafting.draft_lengths import DraftLengths

StepTime = Callable[[int, int], float]  # of a batch size and a number of drafts, in seconds


class SimulatedEngine:
    """Runs steps as the scheduler does; drafts of one are verified in the next."""

    def __init__(
        self, step_time: StepTime, max_num_drafts: int, draft_share: float = 0.25, noise: float = 0
    ):
        self.step_time = step_time
        self.max_num_drafts = max_num_drafts
        self.now = 0.0
        self.lengths = DraftLengths(max_num_drafts, draft_share, clock=lambda: self.now)
        self.noise = noise
        self.random = random.Random(0)
        self.chosen: list[int] = []
        self.num_tokens = 0
        self.drafts: dict[str, int] = {}

    def run(
        self,
        num_steps: int,
        rates: Sequence[float],
        limits: Sequence[int] = (),
        num_prompts: int = 0,
        first_id: int = 0,
    ) -> float:
        """Run steps of a batch whose requests' drafts are accepted at such rates: tokens a second.

        Args:
            num_steps: How many steps.
            rates: The chance of the next draft of each request.
            limits: How many tokens each drafts at most; all that the engine allows if empty.
            num_prompts: Requests in the middle of a prompt that are in each step too.
            first_id: Of the requests; another number makes them new ones.
        """
        ids = [str(first_id + index) for index in range(len(rates))]
        by_id = dict(zip(ids, limits or [self.max_num_drafts] * len(ids), strict=True))
        start_time, start_tokens = self.now, self.num_tokens
        for _ in range(num_steps):
            num_drafts = min(self.lengths.choose(by_id), max(by_id.values()))
            results = {}
            for request_id, rate in zip(ids, rates, strict=True):
                drafted, accepted = self.drafts.get(request_id, 0), 0
                while accepted < drafted and self.random.random() < rate:
                    accepted += 1
                results[request_id] = DraftResult(drafted, accepted)
                self.num_tokens += 1 + accepted
            verified = max(result.num_drafts for result in results.values())
            # Half of it is of the drafts that were brought, half of those that are made.
            size = len(ids)
            seconds = (self.step_time(size, verified) + self.step_time(size, num_drafts)) / 2
            self.now += seconds * self.random.lognormvariate(0, self.noise)
            self.lengths.observe(num_drafts, results, is_decode=num_prompts == 0)
            self.drafts = {each: min(num_drafts, by_id[each]) for each in ids}
            self.chosen.append(num_drafts)
        return (self.num_tokens - start_tokens) / (self.now - start_time)


def best_rate(step_time: StepTime, rates: Sequence[float], max_num_drafts: int) -> float:
    """Tokens a second of the best fixed number of drafts."""
    size = len(rates)
    return max(
        sum(sum(rate**i for i in range(k + 1)) for rate in rates) / step_time(size, k)
        for k in range(max_num_drafts + 1)
    )
