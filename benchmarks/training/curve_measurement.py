"""How many of K drafts are accepted, greedily, of one of the three curves.

No loop drafts: a draft that is still in the running follows tokens that the whole model chose, so
passes over the model's own completion tell what each round would draft, the j-th of a round from
its own round's keys and values where a draft LoRA has changed them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks.training.curve_learners import NUM_SPECULATIVE_TOKENS, Learner
from layerskip_vllm.training.exit_evaluation import complete_batch, simulate_acceptance

PROMPTS_AT_ONCE = 8


@dataclass(frozen=True)
class Completions:
    """Prompts of one length and what the whole model appends to each, greedily."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Drafts:
    """What became of one exit's drafts over some completions."""

    accepted: float  # of a round's K, on average
    accepted_first: float  # the share of rounds whose first draft was accepted
    agreement: float  # the share of places where the first draft of a round would be right
    num_rounds: int


def answer_prompts(
    model: Any, prompts: Sequence[Sequence[int]], num_new_tokens: int, eos_token_ids: set[int]
) -> Completions:
    """Complete prompts of one length."""
    return Completions(prompts, complete_batch(model, prompts, num_new_tokens, eos_token_ids))


@torch.no_grad()
def measure_chains(
    learner: Learner, head: Any, exit_layer: int, completions: Completions
) -> Drafts:
    """Measure an exit's drafts; `head` makes logits of what it drafts from."""
    matches = []
    for start in range(0, len(completions.prompts), PROMPTS_AT_ONCE):
        part = slice(start, start + PROMPTS_AT_ONCE)
        prompts, answers = completions.prompts[part], completions.answers[part]
        matches += _match_drafts(learner, head, exit_layer, prompts, answers)
    acceptance = simulate_acceptance(matches, NUM_SPECULATIVE_TOKENS)
    first = torch.cat([match[0, 1:] for match in matches])
    return Drafts(
        accepted=NUM_SPECULATIVE_TOKENS * acceptance.rate,
        accepted_first=acceptance.rate_by_position[0],
        agreement=first.float().mean().item(),
        num_rounds=acceptance.num_rounds,
    )


def _match_drafts(
    learner: Learner,
    head: Any,
    exit_layer: int,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[torch.Tensor]:
    """Say where the j-th draft of a round would be the answer's token, `[K, num_tokens] bool`."""
    longest = max(map(len, answers))
    rows = [
        [*prompt, *answer, *[0] * (longest - len(answer))]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    token_ids = torch.tensor(rows, device=head.weight.device)
    # A token is drafted where the one before it is fed.
    fed = torch.arange(longest) + len(prompts[0]) - 1
    choices = torch.stack(
        [
            head(states[:, fed]).argmax(-1).cpu()
            for states in learner.draft_states(token_ids, exit_layer)
        ]
    )  # [num_offsets, num_prompts, longest]
    # The j-th draft of a round is fed j places after the round's first.
    offsets = (fed - torch.arange(NUM_SPECULATIVE_TOKENS)[:, None]) % len(choices)
    drafts = choices[offsets, :, torch.arange(longest)].permute(2, 0, 1)
    return [
        draft[:, : len(answer)] == torch.tensor(answer)
        for draft, answer in zip(drafts, answers, strict=True)
    ]


@torch.no_grad()
def measure_last_loss(model: Any, sequences: torch.Tensor) -> float:
    """Return the model's mean cross-entropy in nats per token on `[num, seq_len] int64`."""
    losses = []
    for rows in torch.split(sequences, PROMPTS_AT_ONCE):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        losses.append(functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum"))
    num_tokens = sequences[:, 1:].numel()
    return float(torch.stack(losses).sum() / num_tokens)
