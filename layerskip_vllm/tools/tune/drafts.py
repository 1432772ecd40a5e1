"""Where each exit would have drafted what the whole model said, and drafting played over it.

Part of `layerskip-vllm tune`; no vLLM in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layerskip_vllm.drafting.lookup import find_copy
from layerskip_vllm.tools.exits.measure import read_draft_shares
from layerskip_vllm.training.exit_evaluation import (
    choose_at_exits,
    complete_batch,
    count_runs,
    join_rows,
    play_rounds,
)
from layerskip_vllm.training.exit_head import ExitHead

Runs = Sequence[Sequence[int]]  # by prompt, by place in its completion


@dataclass(frozen=True)
class PlayedDrafts:
    """What drafting gives on average, round by round."""

    num_tokens: float  # of a round: those accepted, and the target's own
    copy_share: float  # of the rounds, those whose draft was copied


@dataclass(frozen=True)
class DraftRecord:
    """What every exit would have drafted in the whole model's own completions."""

    num_layers: int
    head_layers: float  # the size of the head, in layers
    # By draft vocabulary, the whole one first, and by exit layer from 1: how many tokens of a
    # draft from each place on are right.
    runs: Sequence[Sequence[Runs]]
    copies: Runs  # how many tokens of a copy are; -1 where there is none

    def play(
        self, exit_layer: int, num_drafts: int, vocab: int = 0, looks_up: bool = False
    ) -> PlayedDrafts:
        """Play rounds of `num_drafts` tokens from an exit, with copies where they are looked up."""
        copies = self.copies if looks_up else None
        return play_all(self.runs[vocab][exit_layer - 1], copies, num_drafts)


def play_all(runs: Runs, copies: Runs | None, num_drafts: int) -> PlayedDrafts:
    """Play drafting over completions."""
    if num_drafts == 0:
        return PlayedDrafts(1.0, 0.0)
    rounds = [
        each
        for row, run in enumerate(runs)
        for each in play_rounds(run, num_drafts, None if copies is None else copies[row])
    ]
    total = max(1, len(rounds))
    num_accepted = sum(accepted for accepted, _ in rounds)
    return PlayedDrafts(1 + num_accepted / total, sum(copied for _, copied in rounds) / total)


def measure_drafts(
    model: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    eos_token_ids: Collection[int],
    draft_vocabs: Sequence[Sequence[int]],
    longest_draft: int,
    on_exits: Callable[[int], None] = lambda _: None,
) -> DraftRecord:
    """Complete prompts of one length greedily, all at once, and read every exit over the texts.

    `on_exits` hears how many exits were read. A ValueError says that nothing was completed.
    """
    completions = complete_batch(model, prompts, max_tokens, eos_token_ids)
    if max(map(len, completions)) <= 1:
        raise ValueError("data has prompts that the model ends at once, all of them; give others.")
    rows = join_rows(prompts, completions).to(model.device)
    vocabs = [torch.tensor(sorted(ids)) for ids in draft_vocabs]
    start = len(prompts[0]) - 1
    choices = choose_at_exits(ExitHead(model), rows, start, vocabs, on_exits)
    said = rows[:, start + 1 :].cpu()
    shares = read_draft_shares(model)
    num_layers = len(shares) - 1
    return DraftRecord(
        num_layers=num_layers,
        head_layers=shares[0] / (1 - shares[0]) * num_layers,
        runs=[
            [
                [
                    count_runs(row[: len(text)], longest_draft)
                    for row, text in zip(rows, completions, strict=True)
                ]
                for rows in by_exit
            ]
            for by_exit in choices == said
        ],
        copies=[
            find_copied_lengths(prompt, completion, longest_draft)
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
    )


def find_copied_lengths(prompt: list[int], completion: list[int], longest_draft: int) -> list[int]:
    """Count how many tokens a copy has right at each place of a completion; -1 without a copy."""
    text = np.array(prompt + completion, dtype=np.int32)
    counts = []
    for place in range(len(prompt), len(text)):
        copy = find_copy(text[:place], longest_draft)
        if copy is None:
            counts.append(-1)
            continue
        said = text[place : place + longest_draft]
        wrong = np.flatnonzero(copy[: len(said)] != said)
        counts.append(int(wrong[0]) if len(wrong) else len(said))
    return counts
