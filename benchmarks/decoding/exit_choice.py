"""Whether an exit chosen anew for each draft would pay, from where each exit agrees with the model.

    python -m benchmarks.decoding.exit_choice

No engine: a Hugging Face model completes prompts of easy and of hard text greedily, and rounds of
drafting and verifying are played over what each of its exits would have drafted. A round may leave
at any exit, as the verification before it wrote the keys and values of all layers. Speeds are by
bytes read, at batch 1, the model's own step being 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rich.table import Table

from layerskip_vllm.tools.output import make_console, write_json
from layerskip_vllm.tools.speedup_bound import cost_of_round

OUTPUT = Path("benchmark-output/exit-choice.json")
MAX_K = 8
DECAYS = (0.0, 0.5, 0.8, 0.95)  # of what earlier rounds showed; 0 for the last round alone
PROBE_EVERY = 16


@dataclass(frozen=True)
class DraftPlan:
    """A way to draft: E and K."""

    exit_layer: int
    num_tokens: int


# For each prompt, for each exit, whether it would have drafted the token: [num_layers][num_tokens].
Matches: TypeAlias = Sequence[Sequence[Sequence[bool]]]


@dataclass
class History:
    """What one request's rounds have shown of each exit: its acceptance lately, decayed by round.

    Attributes:
        decay: What is kept of earlier rounds in each.
        accepted: By exit, drafts that were accepted, with the prior's.
        tried: By exit, those and the ones that ended a round's.
        num_rounds: Rounds so far.
    """

    decay: float
    accepted: dict[int, float]
    tried: dict[int, float]
    num_rounds: int = 0

    def observe(self, exit_layer: int, num_accepted: int, num_tokens: int) -> None:
        """Fold in what a round did, or would have done, at an exit."""
        num_tried = num_accepted + (num_accepted < num_tokens)
        self.accepted[exit_layer] = self.decay * self.accepted[exit_layer] + num_accepted
        self.tried[exit_layer] = self.decay * self.tried[exit_layer] + num_tried

    def rate(self, exit_layer: int) -> float:
        """Estimate the chance that a draft is accepted whose predecessors were."""
        return self.accepted[exit_layer] / self.tried[exit_layer]


class Game:
    """Rounds of drafting over the matches of many prompts."""

    def __init__(self, matches: Matches, shares: Sequence[float]):
        """Take `shares[E]`, what a draft step of E layers reads, and the matches of each prompt."""
        self.matches = matches
        self.shares = shares

    def cost(self, draft: DraftPlan) -> float:
        """Return what a round reads, in steps of the model."""
        return cost_of_round(self.shares[draft.exit_layer], draft.num_tokens)

    def accept(self, prompt: int, place: int, draft: DraftPlan) -> int:
        """Count the accepted tokens of a draft at a place."""
        flags = self.matches[prompt][draft.exit_layer - 1]
        accepted = 0
        while accepted < draft.num_tokens and flags[place + accepted]:
            accepted += 1
        return accepted

    def last_place(self, prompt: int) -> int:
        """Return the place at which no round begins any more, so that any K fits."""
        return len(self.matches[prompt][0]) - MAX_K

    def speed(
        self, choose: Callable[[int, int], DraftPlan], observe: Observe | None = None
    ) -> float:
        """Play all prompts; `choose(prompt, place)` says how each round drafts."""
        num_tokens, cost = 0, 0.0
        for prompt in range(len(self.matches)):
            place = 1
            while place < self.last_place(prompt):
                draft = choose(prompt, place)
                accepted = self.accept(prompt, place, draft)
                if observe is not None:
                    observe(prompt, place, draft, accepted)
                place += accepted + 1
                num_tokens += accepted + 1
                cost += self.cost(draft)
        return num_tokens / cost

    def best_fixed(self, drafts: Sequence[DraftPlan]) -> tuple[float, DraftPlan]:
        """Find the one that is fastest over all prompts, and how fast."""
        return max(
            ((self.speed(lambda *_, d=draft: d), draft) for draft in drafts), key=lambda s: s[0]
        )

    def oracle_speed(self, drafts: Sequence[DraftPlan]) -> float:
        """How fast it is to draft in the best way at each place, known beforehand."""
        num_tokens, cost = 0, 0.0
        for prompt in range(len(self.matches)):
            end = self.last_place(prompt)
            # The least cost, and with it the tokens, from each place on.
            best: list[tuple[float, int]] = [(0.0, 0)] * (end + MAX_K + 1)
            for place in range(end - 1, 0, -1):
                options = []
                for draft in drafts:
                    step = self.accept(prompt, place, draft) + 1
                    after_cost, after_tokens = best[place + step]
                    options.append((self.cost(draft) + after_cost, after_tokens + step))
                # A round that runs past the end has its tokens too.
                best[place] = min(options, key=lambda option: option[0] - option[1] * 1e-9)
            cost += best[1][0]
            num_tokens += best[1][1]
        return num_tokens / cost

    def agreement(self) -> dict[int, float]:
        """Return how often each exit agrees with the model, by its number of layers."""
        num_exits = len(self.matches[0])
        return {
            exit_layer: sum(sum(rows[exit_layer - 1]) for rows in self.matches)
            / sum(len(rows[exit_layer - 1]) for rows in self.matches)
            for exit_layer in range(1, num_exits + 1)
        }

    def history_speed(
        self,
        drafts: Sequence[DraftPlan],
        decay: float,
        sees_all: bool,
        prior: Mapping[int, float],
    ) -> float:
        """How fast it is to draft in the way that a request's own rounds promise most of.

        With `sees_all` each round shows what every exit would have drafted, which nobody could know
        for nothing; else that of the exit that drafted, and the others take turns now and then. A
        request begins with `prior`, how often each exit agreed elsewhere.
        """
        exits = sorted({draft.exit_layer for draft in drafts})
        histories: dict[int, History] = {}

        def choose(prompt: int, place: int) -> DraftPlan:
            history = histories.setdefault(
                prompt,
                History(decay, {e: 4 * prior[e] for e in exits}, dict.fromkeys(exits, 4.0)),
            )
            history.num_rounds += 1
            allowed = drafts
            if not sees_all and history.num_rounds % PROBE_EVERY == 0:
                probed = exits[history.num_rounds // PROBE_EVERY % len(exits)]
                allowed = [draft for draft in drafts if draft.exit_layer == probed]
            return max(allowed, key=lambda draft: self.promise(draft, history.rate))

        def observe(prompt: int, place: int, draft: DraftPlan, accepted: int) -> None:
            for exit_layer in exits if sees_all else [draft.exit_layer]:
                same = DraftPlan(exit_layer, draft.num_tokens)
                histories[prompt].observe(
                    exit_layer, self.accept(prompt, place, same), draft.num_tokens
                )

        return self.speed(choose, observe)

    def promise(self, draft: DraftPlan, rate: Callable[[int], float]) -> float:
        """Tokens by cost that a draft promises if each token is accepted at its exit's rate."""
        chance = rate(draft.exit_layer)
        num_tokens = sum(chance**position for position in range(draft.num_tokens + 1))
        return num_tokens / self.cost(draft)


Observe: TypeAlias = Callable[[int, int, DraftPlan, int], None]


@dataclass(frozen=True)
class ExitChoice:
    """Speeds over plain decoding of one way to take K."""

    k: str
    best_fixed: DraftPlan
    fixed: float
    realisable: float  # from the rounds of the exit that drafted
    all_seen: float  # from what all exits would have drafted in past rounds
    by_request: float  # the best exit of each request, known beforehand
    oracle: float  # the best exit of each round, known beforehand


def compare(
    tuned_on: Game, game: Game, exits: Sequence[int], k: str, by_exit: dict[int, list[int]]
) -> ExitChoice:
    """Compare ways to choose the exit, with the values of K that each exit may take.

    What is fixed, the one exit or the rule's exits and memory, is chosen by other prompts.
    """
    drafts = [DraftPlan(e, num) for e in exits for num in by_exit[e]]
    prior = tuned_on.agreement()
    best = tuned_on.best_fixed(drafts)[1]
    of_best = [draft for draft in drafts if draft.exit_layer == best.exit_layer]
    pairs = [
        [*of_best, *(draft for draft in drafts if draft.exit_layer == other)]
        for other in exits
        if other != best.exit_layer
    ]

    def play(sets: Sequence[Sequence[DraftPlan]], sees_all: bool) -> float:
        rules = [(some, decay, sees_all, prior) for some in sets for decay in DECAYS]
        return game.history_speed(*max(rules, key=lambda rule: tuned_on.history_speed(*rule)))

    alone = [Game([rows], game.shares).best_fixed(drafts)[0] for rows in game.matches]
    num_tokens = [game.last_place(prompt) for prompt in range(len(alone))]
    return ExitChoice(
        k,
        best,
        # Where K is chosen each round, it is for the fixed exit too.
        fixed=play([of_best], True) if len(of_best) > 1 else game.speed(lambda *_: best),
        realisable=play([drafts, *pairs], False),
        all_seen=play([drafts, *pairs], True),
        by_request=sum(num_tokens)
        / sum(num / speed for num, speed in zip(num_tokens, alone, strict=True)),
        oracle=game.oracle_speed(drafts),
    )


def main() -> None:
    """Complete the prompts, play all ways, and print the tables."""
    options = parse_args()
    from layerskip_vllm.tools.exits import measure
    from layerskip_vllm.tools.text import encode_documents, read_documents
    from layerskip_vllm.training.exit_evaluation import exit_matches

    model, tokenizer = measure.load_decoder(options.model, None, "float32")
    shares = measure.read_draft_shares(model)
    eos_token_ids = measure.find_eos_token_ids(model, tokenizer)
    kinds: dict[str, Matches] = {}
    for name in options.data:
        text = encode_documents(tokenizer, read_documents([name]))
        prompts = text.cut_prompts(options.num_prompts, options.num_prompt_tokens)
        rows = exit_matches(model, prompts, options.max_tokens, eos_token_ids, len(prompts))
        kinds[name] = [row.tolist() for row in rows if row.shape[1] > MAX_K + 1]
    mix = Game([row for rows in kinds.values() for row in rows], shares)
    halves = [Game(mix.matches[start::2], shares) for start in (0, 1)]
    console = make_console()
    console.print(
        build_fixed_table(mix, {n: Game(rows, shares) for n, rows in kinds.items()}, options.exits)
    )
    best_k = {e: [halves[0].best_fixed(all_of(e))[1].num_tokens] for e in options.exits}
    comparisons = [
        compare(halves[0], halves[1], options.exits, k, by_exit)
        for k, by_exit in (
            ("4", {e: [4] for e in options.exits}),
            ("the best of each exit", best_k),
            ("chosen each round", {e: list(range(1, MAX_K + 1)) for e in options.exits}),
        )
    ]
    console.print(build_choice_table(comparisons))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, [vars(c) | {"best_fixed": vars(c.best_fixed)} for c in comparisons])
    console.print(f"Written: {options.output}")


def all_of(exit_layer: int) -> list[DraftPlan]:
    """All drafts of an exit."""
    return [DraftPlan(exit_layer, num) for num in range(1, MAX_K + 1)]


def build_fixed_table(mix: Game, kinds: dict[str, Game], exits: Sequence[int]) -> Table:
    """Lay out an exit a line: how fast it is alone."""
    table = Table(title="one exit: its best K, and times plain")
    games = {"mix": mix, **kinds}
    for heading in ("E", *(f"{name}{what}" for name in games for what in (", K", ", times"))):
        table.add_column(heading, justify="right")
    for exit_layer in exits:
        found = [game.best_fixed(all_of(exit_layer)) for game in games.values()]
        cells = (cell for speed, draft in found for cell in (str(draft.num_tokens), f"{speed:.2f}"))
        table.add_row(str(exit_layer), *cells)
    return table


def build_choice_table(comparisons: Sequence[ExitChoice]) -> Table:
    """Lay out a way to take K a line: what each way to choose the exit gains."""
    table = Table(title="the exit chosen each round: times plain, and times the best fixed exit")
    ways = ("realisable", "all_seen", "by_request", "oracle")
    for heading in ("K", "best fixed E", "fixed", *ways):
        table.add_column(heading.replace("_", " "), justify="right")
    for c in comparisons:
        cells = (f"{getattr(c, way):.2f}, {getattr(c, way) / c.fixed:.3f}" for way in ways)
        table.add_row(c.k, str(c.best_fixed.exit_layer), f"{c.fixed:.2f}", *cells)
    return table


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="checkpoints/stdlib-24l")
    parser.add_argument("--data", nargs="+", default=["stdlib", "docs"], help="a kind of text each")
    parser.add_argument("--exits", type=int, nargs="+", default=[3, 4, 6, 7, 9, 12])
    parser.add_argument("--num-prompts", type=int, default=24, help="of each kind")
    parser.add_argument("--num-prompt-tokens", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
