"""The three curves: a draft LoRA's mathematics, drafts against a loop, runs that broke off."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.training import curve_targets, three_curves_picture
from benchmarks.training.curve_learners import (
    NUM_SPECULATIVE_TOKENS,
    DraftLoraLearner,
    ExitAdapterLearner,
    Learner,
    RecipeLearner,
)
from benchmarks.training.curve_measurement import answer_prompts, measure_chains
from benchmarks.training.curve_targets import TargetFile, TopTokens, head_loss
from benchmarks.training.curve_training import Curve, StopRequest, train_curve
from benchmarks.training.draft_lora import LORA_SCALE, DraftLora, LowRank, run_prefix
from benchmarks.training.three_curves import open_study

EXIT_LAYER, NUM_LAYERS, VOCAB_SIZE = 6, 8, 16
SEQ_LEN, ROWS_PER_STEP = 12, 2
NO_EOS = {VOCAB_SIZE}
PROMPTS = torch.randint(VOCAB_SIZE, (12, 5), generator=torch.Generator().manual_seed(3)).tolist()


def make_model() -> LlamaForCausalLM:
    """A random model whose first layers often, but not always, choose what the whole one does."""
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
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_rows(num_rows: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB_SIZE, (num_rows, SEQ_LEN), generator=generator)


def make_lora_learner(tmp_path: Path, size: float = 0.0) -> DraftLoraLearner:
    """A draft LoRA, changed by chance where there is a size."""
    model = make_model()
    learner = DraftLoraLearner(
        model, EXIT_LAYER, TargetFile(tmp_path / "targets.bin", model, make_rows())
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in learner.trained.named_parameters():
            if name.endswith(("up", "scale")):
                weight += size * torch.randn_like(weight)
    return learner


def merge(learner: DraftLoraLearner) -> LlamaForCausalLM:
    """The first layers with the LoRA in their weights, alone."""
    merged = copy.deepcopy(learner._model)
    lora = learner.trained
    assert isinstance(lora, DraftLora)
    merged.model.layers = merged.model.layers[:EXIT_LAYER]
    with torch.no_grad():
        for name, change in lora.changes.items():
            linear = merged.model.layers.get_submodule(name.replace("-", "."))
            assert isinstance(change, LowRank)
            assert isinstance(linear, nn.Linear)
            linear.weight += LORA_SCALE * change.up @ change.down
            linear._forward_hooks.clear()
        merged.model.norm.weight *= 1 + lora.scale
    return merged


@torch.no_grad()
def draft_and_verify(
    model: LlamaForCausalLM, draft_model: Any, prompt: list[int], answer: list[int]
) -> list[int]:
    """How many drafts each round accepted; the drafting model has the other's keys and values."""
    accepted, place = [], 1
    while place + NUM_SPECULATIVE_TOKENS <= len(answer):
        verified = [*prompt, *answer[:place]]
        cache = DynamicCache()
        model(torch.tensor([verified[:-1]]), past_key_values=cache, use_cache=True)
        fed, drafts = verified[-1], []
        for _ in range(NUM_SPECULATIVE_TOKENS):
            output = draft_model(torch.tensor([[fed]]), past_key_values=cache, use_cache=True)
            fed = int(output.logits[0, -1].argmax())
            drafts.append(fed)
        num = 0
        while num < len(drafts) and drafts[num] == answer[place + num]:
            num += 1
        accepted.append(num)
        place += num + 1
    return accepted


@pytest.mark.parametrize("size", [0.0, 0.02])
def test_accepted_equals_a_loop_that_drafts_when_greedy(tmp_path: Path, size: float) -> None:
    learner = make_lora_learner(tmp_path, size)
    model = learner._model
    completions = answer_prompts(model, PROMPTS, 24, NO_EOS)

    drafts = measure_chains(learner, model.lm_head, EXIT_LAYER, completions)

    expected = [
        count
        for prompt, answer in zip(PROMPTS, completions.answers, strict=True)
        for count in draft_and_verify(model, merge(learner), list(prompt), list(answer))
    ]
    assert drafts.num_rounds == len(expected) > 50
    assert drafts.accepted == pytest.approx(sum(expected) / len(expected))
    assert drafts.accepted_first == pytest.approx(sum(n > 0 for n in expected) / len(expected))
    assert 0.2 < drafts.accepted < 3.5


def test_accepted_of_an_adapter_equals_the_loop_when_it_is_untrained(tmp_path: Path) -> None:
    lora, model = make_lora_learner(tmp_path), make_model()
    adapter = ExitAdapterLearner(model, EXIT_LAYER, TargetFile(tmp_path / "t", model, make_rows()))
    completions = answer_prompts(model, PROMPTS, 24, NO_EOS)

    results = [
        measure_chains(each, model.lm_head, EXIT_LAYER, completions) for each in (adapter, lora)
    ]

    assert results[0] == results[1]


@torch.no_grad()
def test_draft_lora_changes_nothing_when_it_is_new_or_off(tmp_path: Path) -> None:
    rows = make_rows()
    plain = run_prefix(make_model(), rows, EXIT_LAYER)
    new, changed = make_lora_learner(tmp_path), make_lora_learner(tmp_path, 0.1)

    for states in new.draft_states(rows, EXIT_LAYER):
        torch.testing.assert_close(states, plain, rtol=0, atol=1e-5)
    for states in changed.draft_states(rows, EXIT_LAYER):
        assert (states - plain).abs().max() > 0.01
    assert torch.equal(run_prefix(changed._model, rows, EXIT_LAYER), plain)


@torch.no_grad()
def test_prefix_is_the_models_own_when_all_layers_run() -> None:
    model, rows = make_model(), make_rows()

    logits = model.lm_head(run_prefix(model, rows, NUM_LAYERS))

    torch.testing.assert_close(logits, model(rows).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_draft_lora_is_any_change_of_a_layer_when_its_rank_is_full() -> None:
    model, other, rows = make_model(), make_model(), make_rows()
    lora = DraftLora(model.model.layers[:1], hidden_size=16, rank=24, seed=0)
    for name, change in lora.changes.items():
        assert isinstance(change, LowRank)
        linear = other.model.layers.get_submodule(name.replace("-", "."))
        delta = 0.2 * torch.randn_like(linear.weight)
        linear.weight += delta
        change.up.copy_(delta @ torch.linalg.pinv(change.down) / LORA_SCALE)
    assert len(lora.changes) == 7

    with lora.on():
        states = run_prefix(model, rows, 1)

    torch.testing.assert_close(states, run_prefix(other, rows, 1), rtol=0, atol=1e-4)
    assert (states - run_prefix(model, rows, 1)).abs().max() > 0.1


def test_head_loss_is_the_cross_entropy_when_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve_targets, "MAX_LOGITS_AT_ONCE", 3 * VOCAB_SIZE)
    torch.manual_seed(0)
    states, head = torch.randn(10, 8, requires_grad=True), torch.randn(VOCAB_SIZE, 8)
    probs = torch.rand(10, 4).softmax(-1)
    token_ids = torch.stack([torch.randperm(VOCAB_SIZE)[:4] for _ in range(10)])
    soft_labels = torch.zeros(10, VOCAB_SIZE).scatter(1, token_ids, probs)
    expected = functional.cross_entropy(states @ head.T, soft_labels)
    (gradient,) = torch.autograd.grad(2 * expected, states)

    loss = head_loss(states, head, TopTokens(token_ids, probs))
    (2 * loss).backward()

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(states.grad, gradient)


def test_targets_are_the_last_layers_when_a_killed_run_left_half_a_row(tmp_path: Path) -> None:
    model, rows, file = make_model(), make_rows(12), tmp_path / "targets.bin"
    whole = TargetFile(file, model, rows).read(8, 2)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 5])

    again = TargetFile(file, model, rows).read(8, 2)

    assert torch.equal(again.token_ids, whole.token_ids)
    probs = model(rows[8:10]).logits.flatten(0, 1).softmax(-1)
    torch.testing.assert_close(probs.gather(1, again.token_ids), again.probs, rtol=0, atol=1e-3)


def make_learner(kind: str, folder: Path, rows: torch.Tensor) -> tuple[Learner, Any]:
    model = make_model()
    targets = TargetFile(folder / "targets.bin", model, rows)
    if kind == "recipe":
        return RecipeLearner(model, (EXIT_LAYER,), torch.float32), model
    learner = ExitAdapterLearner if kind == "exit_adapter" else DraftLoraLearner
    return learner(model, EXIT_LAYER, targets), model


def train(kind: str, folder: Path, num_tokens: int, stop_at: int | None = None) -> Curve:
    """A run in a folder, asked to stop in the middle of a step where that is told."""
    folder.mkdir(exist_ok=True)
    rows, stop = make_rows(), StopRequest()
    learner, model = make_learner(kind, folder, rows)
    curve = Curve(learner, folder / "curve.pt")
    loss = learner.loss

    def stopping_loss(token_ids: torch.Tensor, first_row: int, step: int) -> torch.Tensor:
        if step == stop_at:
            stop()
        return loss(token_ids, first_row, step)

    learner.loss = stopping_loss  # type: ignore[method-assign]

    def measure() -> list[dict[str, Any]]:
        completions = answer_prompts(model, PROMPTS, 8, NO_EOS)
        states = learner.draft_states(rows, EXIT_LAYER)
        num = sum(state.detach().sum().item() for state in states)
        drafts = measure_chains(learner, model.lm_head, EXIT_LAYER, completions)
        return [{"accepted": drafts.accepted, "sum": num}]

    train_curve(curve, rows, ROWS_PER_STEP, num_tokens, measure, stop)
    return curve


@pytest.mark.parametrize("kind", ["exit_adapter", "draft_lora", "recipe"])
def test_points_are_an_unbroken_runs_when_it_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("benchmarks.training.curve_training.FIRST_POINT", 60)
    num_tokens = 10 * ROWS_PER_STEP * SEQ_LEN  # three passes and a step over the rows
    unbroken = train(kind, tmp_path / "unbroken", num_tokens)

    broken = tmp_path / "broken"
    assert train(kind, broken, num_tokens, stop_at=3).step == 4
    assert train(kind, broken, num_tokens, stop_at=6).step == 7
    resumed = train(kind, broken, num_tokens)

    tokens = [point["tokens"] for point in unbroken.points]
    assert tokens == [0, 72, 96, 120, 192, 240]
    assert resumed.points == unbroken.points
    assert len({point["sum"] for point in unbroken.points}) == len(tokens)
    for first, second in zip(
        resumed.learner.trained.parameters(), unbroken.learner.trained.parameters(), strict=True
    ):
        assert torch.equal(first, second)


def test_run_goes_on_when_it_is_given_more_tokens(tmp_path: Path) -> None:
    num_tokens = ROWS_PER_STEP * SEQ_LEN
    assert train("exit_adapter", tmp_path, 2 * num_tokens).step == 2
    assert train("exit_adapter", tmp_path, 2 * num_tokens).step == 2
    assert [p["tokens"] for p in train("exit_adapter", tmp_path, 3 * num_tokens).points] == [
        0,
        2 * num_tokens,
        3 * num_tokens,
    ]


def test_stop_ends_at_once_when_nothing_would_be_lost() -> None:
    stop = StopRequest()
    stop.can_leave = False
    stop(signal.SIGTERM, None)
    assert stop.is_made

    stop.can_leave = True
    with pytest.raises(SystemExit):
        stop(signal.SIGTERM, None)


def test_study_is_refused_when_its_model_is_another(tmp_path: Path) -> None:
    folder = tmp_path / "curves"
    prompts = {"code": [[1, 2]]}
    assert open_study(folder, {"model": "a"}, prompts) == prompts
    assert open_study(folder, {"model": "a"}, {"code": [[3, 4]]}) == prompts
    with pytest.raises(ValueError, match="have model 'a', not 'b'"):
        open_study(folder, {"model": "b"}, prompts)


def test_break_even_is_what_the_bytes_say_when_drafts_read_less() -> None:
    checkpoint = Path(__file__).parents[3] / "checkpoints/stdlib-24l"
    limits = three_curves_picture.find_break_even(str(checkpoint), 6)

    layer, head = 196_864, 262_144
    whole = 24 * layer + head
    assert limits["whole head"] == pytest.approx(4 * (6 * layer + head) / whole)
    assert limits["an eighth of the head"] == pytest.approx(4 * (6 * layer + head / 8) / whole)
