"""Measures every exit of a model on held-out text: its loss, and how its drafts would be accepted.

Called by `pretrain` at the end of a run and by `layerskip-vllm exits`. It needs no drafting loop:
under greedy decoding a draft that is still in the running has seen the tokens that the whole model
chose. So one forward pass over the whole model's own completion tells where an exit would have
drafted the right token.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from layerskip_vllm.training.exit_head import ExitHead


@dataclass(frozen=True)
class Acceptance:
    """What became of the tokens one exit drafted, over `num_rounds` drafts that were verified."""

    rate: float  # accepted tokens over drafted ones
    rate_by_position: list[float]  # the same for each place in the draft, first to last
    num_rounds: int


@dataclass(frozen=True)
class HeldOutExits:
    """What every exit makes of held-out text, first layer to last; the last is the model's own."""

    losses: list[float]  # mean cross-entropy in nats per token
    agreements: list[float]  # share of places where its likeliest token is the last layer's
    num_tokens: int  # places that this is measured over


@torch.inference_mode()
def measure_held_out(
    model: PreTrainedModel,
    sequences: torch.Tensor,
    batch_size: int = 8,
    on_sequences: Callable[[int], None] = lambda _: None,
) -> HeldOutExits:
    """Measure every exit on text that the model has not seen.

    Of `sequences`, `[num_sequences, seq_len + 1] int64`, each token but the first is predicted.
    Exits are unembedded one at a time and in chunks: beside the model's own this takes the memory
    of every layer's output for one batch. `on_sequences` hears how many were done in each.
    """
    head = ExitHead(model)
    num_layers = len(head.parts.layers)
    losses, num_agreed = [0.0] * num_layers, [0] * num_layers
    for rows in torch.split(sequences, batch_size):
        rows = rows.to(model.device)
        outputs = head.run_layers(rows[:, :-1])
        labels = torch.split(rows[:, 1:].flatten(), head.chunk_size)
        choices = []
        for layer_idx in range(num_layers):
            chosen = []
            hidden_states = outputs.pop(layer_idx).flatten(0, 1)
            for logits, labels_part in zip(head.iter_logits(hidden_states), labels, strict=True):
                loss = functional.cross_entropy(logits, labels_part, reduction="sum")
                losses[layer_idx] += loss.item()
                chosen.append(logits.argmax(-1))
            choices.append(torch.cat(chosen))
        for layer_idx in range(num_layers):
            num_agreed[layer_idx] += int((choices[layer_idx] == choices[-1]).sum())
        on_sequences(len(rows))
    num_tokens = sequences[:, 1:].numel()
    return HeldOutExits(
        [loss / num_tokens for loss in losses],
        [count / num_tokens for count in num_agreed],
        num_tokens,
    )


@torch.inference_mode()
def exit_matches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_new_tokens: int,
    eos_token_id: int | Collection[int],
    batch_size: int = 1,
    on_prompts: Callable[[int], None] = lambda _: None,
) -> list[torch.Tensor]:
    """Complete prompts greedily, and say where each exit would have chosen the same token.

    For each prompt `[num_layers, num_new_tokens] bool`, shorter where `eos_token_id`, which is left
    out, ended it earlier. `on_prompts` hears how many were done in each batch. `ValueError` if
    `batch_size` is above 1 and the prompts differ in length.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    if batch_size > 1 and len(lengths) > 1:
        raise ValueError(
            f"batch_size is {batch_size} with prompts of {lengths[0]} to {lengths[-1]} tokens; "
            "prompts of different lengths must be completed one at a time, with batch_size 1."
        )
    head = ExitHead(model)
    matches = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        completions = complete_batch(model, batch, num_new_tokens, eos_token_id)
        rows = join_rows(batch, completions).to(model.device)
        chosen = choose_at_exits(head, rows, len(batch[0]) - 1)[0]
        for row, completion in enumerate(completions):
            matches.append(chosen[:, row, : len(completion)] == torch.tensor(completion))
        on_prompts(len(batch))
    return matches


def join_rows(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Join prompts of one length and their completions to rows of one, `[num, length] int64`.

    Shorter completions are filled up: a causal model's outputs do not hang on what comes after.
    """
    longest = max(map(len, completions))
    pairs = zip(prompts, completions, strict=True)
    return torch.tensor([[*p, *c, *[0] * (longest - len(c))] for p, c in pairs])


@torch.inference_mode()
def choose_at_exits(
    head: ExitHead,
    token_ids: torch.Tensor,
    start: int,
    draft_vocabs: Sequence[torch.Tensor] = (),
    on_exits: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Return every exit's choices for the tokens of a batch after `start`.

    `[1 + num_draft_vocabs, num_layers, batch_size, num] int64`: among all tokens, then among those
    of each draft vocabulary, `[num_tokens] int64`. `on_exits` hears how many exits were read.
    """
    batch_size, num_chosen = token_ids.shape[0], token_ids.shape[1] - 1 - start
    vocabs = [ids.to(token_ids.device) for ids in draft_vocabs]
    outputs = head.run_layers(token_ids)
    choices = []
    for layer_idx in range(len(head.parts.layers)):
        hidden_states = outputs.pop(layer_idx)[:, start : start + num_chosen].flatten(0, 1)
        parts = []
        for logits in head.iter_logits(hidden_states):
            chosen = [ids[logits[:, ids].argmax(-1)] for ids in vocabs]
            parts.append(torch.stack([logits.argmax(-1), *chosen]).cpu())
        choices.append(torch.cat(parts, dim=1).view(1 + len(vocabs), batch_size, num_chosen))
        on_exits(1)
    return torch.stack(choices, dim=1)


def complete_greedily(
    model: PreTrainedModel,
    prompt: Sequence[int],
    num_new_tokens: int,
    eos_token_id: int | Collection[int],
) -> list[int]:
    """Return the token ids that the whole model appends to `prompt`, without `eos_token_id`."""
    return complete_batch(model, [prompt], num_new_tokens, eos_token_id)[0]


@torch.inference_mode()
def complete_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_new_tokens: int,
    eos_token_id: int | Collection[int],
) -> list[list[int]]:
    """Complete prompts of one length; the likeliest token always, whatever `generate` would do.

    What ends a text is left out.
    """
    eos_token_ids = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    next_ids = torch.tensor(prompts, device=model.device)
    cache, completions = None, torch.empty(len(prompts), 0, dtype=torch.int64)
    is_over = torch.zeros(len(prompts), dtype=torch.bool)
    while completions.shape[1] < num_new_tokens and not is_over.all():
        output = model(input_ids=next_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        next_ids = output.logits[:, -1].argmax(-1, keepdim=True)
        completions = torch.cat([completions, next_ids.cpu()], dim=1)
        is_over |= torch.tensor([token_id in eos_token_ids for token_id in next_ids[:, 0].tolist()])
    return [
        list(itertools.takewhile(lambda token_id: token_id not in eos_token_ids, row))
        for row in completions.tolist()
    ]


def count_runs(matches: torch.Tensor, num_speculative_tokens: int) -> list[int]:
    """Count how many tokens of a draft that begins at each place are right, one after the other.

    `matches` is `[num] bool`, or `[num_speculative_tokens, num] bool` where it hangs on a token's
    place in the draft whether it is right.
    """
    flags = matches.expand(num_speculative_tokens, -1).tolist()
    num = len(flags[0])
    runs = []
    for start in range(num):
        length = min(num_speculative_tokens, num - start)
        draft = (flags[place][start + place] for place in range(length))
        runs.append(sum(1 for _ in itertools.takewhile(bool, draft)))
    return runs


def play_rounds(
    runs: Sequence[int], num_speculative_tokens: int, copies: Sequence[int] | None = None
) -> Iterator[tuple[int, bool]]:
    """Play greedy self-speculative decoding over a finished text.

    As in vLLM the first new token comes from the prompt's own step, and each round gives the
    accepted drafts and one token more. A last round that runs past the text's end is left out.
    `runs` is what `count_runs` gives; `copies` the same of copied drafts, which take the place of
    the exit's, -1 where there is none. Yields how many drafts each round accepts, and whether they
    were copied.
    """
    place = 1
    while place + num_speculative_tokens <= len(runs):
        copied = -1 if copies is None else copies[place]
        accepted = min(num_speculative_tokens, runs[place] if copied < 0 else copied)
        yield accepted, copied >= 0
        place += accepted + 1


def simulate_acceptance(matches: Sequence[torch.Tensor], num_speculative_tokens: int) -> Acceptance:
    """Play drafting from one exit over texts, from `exit_matches`, see `play_rounds`.

    `matches` has for each prompt `[num_new_tokens] bool`, whether the exit would have drafted the
    token, or `[num_speculative_tokens, num_new_tokens] bool`, whether it would have as that place
    of a draft.
    """
    num_rounds = [0] * (num_speculative_tokens + 1)  # by accepted drafts
    for prompt_matches in matches:
        runs = count_runs(prompt_matches, num_speculative_tokens)
        for accepted, _ in play_rounds(runs, num_speculative_tokens):
            num_rounds[accepted] += 1
    total = max(sum(num_rounds), 1)
    by_position = [sum(num_rounds[place:]) / total for place in range(1, len(num_rounds))]
    return Acceptance(sum(by_position) / num_speculative_tokens, by_position, sum(num_rounds))
