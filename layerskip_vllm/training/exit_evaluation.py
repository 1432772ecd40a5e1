"""Measures every exit of a model on held-out text: its loss, and how its drafts would be accepted.

`pretrain` calls it at the end of a run. It needs no drafting loop: under greedy decoding a draft
that is still in the running has seen the tokens that the whole model chose. So one forward pass
over the whole model's own completion tells where an exit would have drafted the right token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from layerskip_vllm.training.decoder import capture_layer_outputs, find_decoder_parts


@dataclass(frozen=True)
class Acceptance:
    """What became of the tokens one exit drafted.

    Attributes:
        rate: Accepted tokens over drafted tokens.
        rate_by_position: The same for each place in the draft, first to last.
        num_rounds: Rounds of drafting and verifying that this is measured over.
    """

    rate: float
    rate_by_position: list[float]
    num_rounds: int


@torch.inference_mode()
def held_out_exit_losses(
    model: nn.Module, token_ids: torch.Tensor, seq_len: int, batch_size: int = 8
) -> list[float]:
    """Returns each exit's mean cross-entropy in nats per token, first layer to last.

    Args:
        model: A Hugging Face causal language model.
        token_ids: `[num_tokens] int64`, cut into sequences of `seq_len`.
        seq_len: Tokens of a sequence.
        batch_size: Sequences of a forward pass.

    Returns:
        One loss a layer; the last is the model's own.
    """
    parts = find_decoder_parts(model)
    num_layers = len(parts.layers)
    num_sequences = (len(token_ids) - 1) // seq_len
    inputs = token_ids[: num_sequences * seq_len].view(-1, seq_len)
    labels = token_ids[1 : num_sequences * seq_len + 1].view(-1, seq_len)
    totals = [0.0] * num_layers
    for start in range(0, num_sequences, batch_size):
        rows = slice(start, start + batch_size)
        with capture_layer_outputs(parts.layers, range(num_layers)) as outputs:
            parts.decoder(input_ids=inputs[rows], use_cache=False)
        for layer_idx in range(num_layers):
            logits = parts.compute_logits(outputs[layer_idx])
            loss = functional.cross_entropy(
                logits.float().flatten(0, 1), labels[rows].flatten(), reduction="sum"
            )
            totals[layer_idx] += loss.item()
    return [total / inputs.numel() for total in totals]


@torch.inference_mode()
def exit_matches(
    model: nn.Module, prompts: Sequence[Sequence[int]], num_new_tokens: int, eos_token_id: int
) -> list[torch.Tensor]:
    """Completes prompts greedily, and says where each exit would have chosen the same token.

    Args:
        model: A Hugging Face causal language model.
        prompts: Token ids of each prompt.
        num_new_tokens: Limit of a completion's length; `eos_token_id` ends it and is left out.
        eos_token_id: The token that ends a text.

    Returns:
        For each prompt `[num_layers, num_new_tokens] bool`.
    """
    parts = find_decoder_parts(model)
    num_layers = len(parts.layers)
    matches = []
    for prompt in prompts:
        completion = complete_greedily(model, prompt, num_new_tokens, eos_token_id)
        token_ids = torch.tensor([[*prompt, *completion]])
        with capture_layer_outputs(parts.layers, range(num_layers)) as outputs:
            parts.decoder(input_ids=token_ids, use_cache=False)
        predictors = slice(len(prompt) - 1, len(prompt) - 1 + len(completion))
        chosen = torch.stack(
            [
                parts.compute_logits(outputs[i][:, predictors])[0].argmax(-1)
                for i in range(num_layers)
            ]
        )
        matches.append(chosen == torch.tensor(completion))
    return matches


@torch.inference_mode()
def complete_greedily(
    model: nn.Module, prompt: Sequence[int], num_new_tokens: int, eos_token_id: int
) -> list[int]:
    """Returns the token ids that the whole model appends to `prompt`, without `eos_token_id`."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    completion = output[0, len(prompt) :].tolist()
    return completion[:-1] if completion and completion[-1] == eos_token_id else completion


def simulate_acceptance(matches: Sequence[torch.Tensor], num_speculative_tokens: int) -> Acceptance:
    """Plays greedy self-speculative decoding for one exit, from `exit_matches`.

    As in vLLM the first new token comes from the prompt's own step, and each round gives the
    accepted drafts and one token more. A last round that runs past a completion's end is left out.

    Args:
        matches: For each prompt `[num_new_tokens] bool`, whether the exit would have drafted the
            token.
        num_speculative_tokens: K, the tokens drafted in a round.

    Returns:
        Shares over all rounds of all prompts.
    """
    accepted_at = [0] * num_speculative_tokens
    num_rounds = 0
    for prompt_matches in matches:
        flags = prompt_matches.tolist()
        place = 1
        while place + num_speculative_tokens <= len(flags):
            num_accepted = 0
            while num_accepted < num_speculative_tokens and flags[place + num_accepted]:
                accepted_at[num_accepted] += 1
                num_accepted += 1
            place += num_accepted + 1
            num_rounds += 1
    by_position = [count / max(num_rounds, 1) for count in accepted_at]
    return Acceptance(sum(by_position) / num_speculative_tokens, by_position, num_rounds)
