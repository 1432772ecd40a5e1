"""Acceptance against rounds counted by hand, and against a loop that really drafts and verifies."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip_vllm.training import exit_head
from layerskip_vllm.training.exit_evaluation import (
    complete_greedily,
    count_runs,
    exit_matches,
    measure_held_out,
    simulate_acceptance,
)

NUM_LAYERS, VOCAB_SIZE = 4, 16
NO_EOS = VOCAB_SIZE  # No token: completions have their whole length.
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]]


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A random model whose early layers often, but not always, choose what the whole one does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def next_token(model: LlamaForCausalLM, token_ids: list[int], num_layers: int) -> int:
    """What the model cut off after `num_layers` layers would append, from scratch."""
    all_layers = model.model.layers
    model.model.layers = nn.ModuleList(all_layers[:num_layers])
    logits = model(torch.tensor([token_ids]), use_cache=False).logits
    model.model.layers = all_layers
    return int(logits[0, -1].argmax())


def draft_and_verify(
    model: LlamaForCausalLM, prompt: list[int], completion: list[int], exit_layer: int, k: int
) -> list[int]:
    """How many drafts each round accepted, for rounds that lie within the completion."""
    token_ids = [*prompt, completion[0]]
    accepted = []
    while len(token_ids) + k <= len(prompt) + len(completion):
        drafts: list[int] = []
        for _ in range(k):
            drafts.append(next_token(model, token_ids + drafts, exit_layer))
        num_accepted = 0
        while num_accepted < k:
            target = next_token(model, token_ids, NUM_LAYERS)
            token_ids.append(target)
            if target != drafts[num_accepted]:
                break
            num_accepted += 1
        else:
            token_ids.append(next_token(model, token_ids, NUM_LAYERS))
        accepted.append(num_accepted)
    return accepted


def test_acceptance_counts_rounds_when_worked_by_hand():
    # Places 1-3: two accepted, the third rejected. 4-5: rejected at once, then 5-7: all three, and
    # the whole model's own token at 8. A round from 9 would run past the end.
    flags = torch.tensor([False, True, True, False, False, True, True, True, False, True, True])

    acceptance = simulate_acceptance([flags], num_speculative_tokens=3)

    assert acceptance.num_rounds == 3
    assert acceptance.rate_by_position == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert acceptance.rate == pytest.approx(5 / 9)


@pytest.mark.parametrize(
    ("flags", "accepted", "drafted"),
    [
        # Two rounds of two drafts and one token each, after the prompt's own.
        ([[False, True, True, True, True, True]], 4, 4),
        # A miss ends a round and is its token: drafts 1-2, then 2-3 (0 accepted), then 3-4.
        ([[False, False, False, True, True]], 2, 6),
        ([[False, True, False, True, True]], 3, 4),
        # No room for two drafts.
        ([[False, True]], 0, 0),
        ([[False, True, True], [False, False, True]], 2, 4),
    ],
)
def test_acceptance_follows_rounds_when_counted_by_hand(flags, accepted, drafted):
    acceptance = simulate_acceptance([torch.tensor(row) for row in flags], 2)

    assert 2 * acceptance.num_rounds == drafted
    assert acceptance.rate * drafted == pytest.approx(accepted)


def test_acceptance_adds_up_rounds_when_there_are_several_prompts():
    flags = [torch.tensor([True, True, True]), torch.tensor([True, False, True])]

    acceptance = simulate_acceptance(flags, num_speculative_tokens=2)

    assert acceptance.num_rounds == 2
    assert acceptance.rate_by_position == [0.5, 0.5]


def test_runs_are_counted_from_each_place_when_some_are_wrong():
    assert count_runs(torch.tensor([True, True, False, True, True]), 4) == [2, 1, 0, 2, 1]
    assert count_runs(torch.tensor([True, True, True]), 2) == [2, 2, 1]
    assert count_runs(torch.tensor([], dtype=torch.bool), 2) == []


def test_runs_follow_the_place_in_a_draft_when_it_matters():
    assert count_runs(torch.tensor([[True, True, False], [False, False, True]]), 2) == [1, 2, 0]


def test_acceptance_is_zero_when_no_round_fits():
    acceptance = simulate_acceptance([torch.tensor([True, True])], num_speculative_tokens=4)

    assert (acceptance.rate, acceptance.num_rounds) == (0.0, 0)


@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4])
def test_acceptance_equals_a_loop_that_drafts_when_greedy(model, exit_layer):
    k = 3
    completions = [complete_greedily(model, prompt, 20, NO_EOS) for prompt in PROMPTS]
    accepted = [
        count
        for prompt, completion in zip(PROMPTS, completions, strict=True)
        for count in draft_and_verify(model, prompt, completion, exit_layer, k)
    ]

    matches = exit_matches(model, PROMPTS, 20, NO_EOS)
    acceptance = simulate_acceptance([rows[exit_layer - 1] for rows in matches], k)

    assert acceptance.num_rounds == len(accepted) > 4
    assert acceptance.rate == pytest.approx(sum(accepted) / (k * len(accepted)))
    by_position = [sum(count > place for count in accepted) for place in range(k)]
    assert acceptance.rate_by_position == pytest.approx([n / len(accepted) for n in by_position])


def test_completion_equals_repeated_full_forwards_when_greedy(model):
    expected = list(PROMPTS[0])
    for _ in range(8):
        expected.append(next_token(model, expected, NUM_LAYERS))

    assert complete_greedily(model, PROMPTS[0], 8, NO_EOS) == expected[len(PROMPTS[0]) :]


def test_completion_leaves_the_eos_token_out_when_it_comes(model):
    completion = complete_greedily(model, PROMPTS[0], 8, NO_EOS)
    first_new = completion.index(completion[3])

    assert complete_greedily(model, PROMPTS[0], 8, completion[3]) == completion[:first_new]


def test_held_out_losses_are_the_models_own_when_of_the_last_layer(model):
    token_ids = torch.randint(VOCAB_SIZE, (33,), generator=torch.Generator().manual_seed(1))
    inputs, labels = token_ids[:32].view(4, 8), token_ids[1:33].view(4, 8)
    with torch.inference_mode():
        logits = model(inputs, use_cache=False).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()

    losses = measure_held_out(model, token_ids.unfold(0, 9, 8), batch_size=3).losses

    assert len(losses) == NUM_LAYERS
    assert losses[-1] == pytest.approx(expected, rel=1e-5)


def test_completions_are_the_same_when_made_in_a_batch(model):
    prompts = [prompt[:3] for prompt in PROMPTS]
    alone = [complete_greedily(model, prompt, 12, NO_EOS) for prompt in prompts]
    # A token that ends the texts at different lengths.
    eos = max(
        range(VOCAB_SIZE), key=lambda token: len({[*ids, token].index(token) for ids in alone})
    )
    expected = [exit_matches(model, [prompt], 12, [eos, NO_EOS])[0] for prompt in prompts]
    assert len({rows.shape[1] for rows in expected}) > 1

    matches = exit_matches(model, prompts, 12, [eos, NO_EOS], batch_size=2)

    for rows, expected_rows in zip(matches, expected, strict=True):
        assert torch.equal(rows, expected_rows)


def test_matches_are_refused_when_a_batch_has_prompts_of_several_lengths(model):
    with pytest.raises(ValueError, match="batch_size is 2 with prompts of 3 to 5 tokens"):
        exit_matches(model, PROMPTS, 4, NO_EOS, batch_size=2)


def test_completion_is_the_likeliest_when_the_checkpoint_would_have_it_otherwise(model):
    expected = complete_greedily(model, PROMPTS[0], 12, NO_EOS)
    model.generation_config.repetition_penalty = 9.0
    assert len(set(expected)) < len(expected)

    assert complete_greedily(model, PROMPTS[0], 12, NO_EOS) == expected


def test_exits_are_those_of_a_model_cut_off_there_when_read_in_chunks(model, monkeypatch):
    monkeypatch.setattr(exit_head, "MAX_LOGITS_AT_ONCE", 3 * VOCAB_SIZE)
    sequences = torch.randint(VOCAB_SIZE, (5, 8), generator=torch.Generator().manual_seed(1))
    all_layers, losses, choices = model.model.layers, [], []
    for num_layers in range(1, NUM_LAYERS + 1):
        model.model.layers = all_layers[:num_layers]
        with torch.inference_mode():
            logits = model(sequences[:, :-1], use_cache=False).logits.flatten(0, 1)
        losses.append(nn.functional.cross_entropy(logits, sequences[:, 1:].flatten()).item())
        choices.append(logits.argmax(-1))
    model.model.layers = all_layers
    agreements = [(chosen == choices[-1]).double().mean().item() for chosen in choices]
    counts = []

    exits = measure_held_out(model, sequences, batch_size=2, on_sequences=counts.append)

    assert exits.losses == pytest.approx(losses, rel=1e-5)
    assert exits.agreements == pytest.approx(agreements)
    assert 0 < agreements[0] < agreements[-1] == 1
    assert exits.num_tokens == 5 * 7
    assert counts == [2, 2, 1]
