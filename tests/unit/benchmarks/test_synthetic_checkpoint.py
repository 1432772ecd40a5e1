import dataclasses
import json

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.decoding.synthetic_calibration import (
    NUM_CALIBRATION_TOKENS,
    share_of_distinct_ngrams,
)
from benchmarks.decoding.synthetic_checkpoint import make_checkpoint
from benchmarks.decoding.synthetic_spec import (
    NUM_PROMPT_TOKENS,
    PRESETS,
    SyntheticSpec,
    make_prompts,
)
from benchmarks.decoding.weight_counts import count_weights

SPEC = SyntheticSpec(4, 128, 256, 2, 1, 64, 512, exit_layer=1, num_speculative_tokens=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(SPEC, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def models(checkpoint):
    folders = (checkpoint.folder, checkpoint.draft_folder)
    return [LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in folders]


def next_token(model, tokens):
    return model(torch.tensor([tokens])).logits[0, -1].argmax().item()


@torch.inference_mode()
def test_acceptance_is_that_of_draft_and_verify_when_decoding_greedily(checkpoint, models):
    whole, draft_model = models
    prompts = SPEC.calibration_prompts()
    accepted = drafted = 0
    for tokens in prompts[:4]:
        end = len(tokens) + NUM_CALIBRATION_TOKENS
        tokens = [*tokens, next_token(whole, tokens)]
        while len(tokens) + SPEC.num_speculative_tokens <= end:
            drafts = []
            for _ in range(SPEC.num_speculative_tokens):
                drafts.append(next_token(draft_model, tokens + drafts))
            drafted += len(drafts)
            for draft in [*drafts, None]:
                tokens = [*tokens, next_token(whole, tokens)]
                if tokens[-1] != draft:
                    break
                accepted += 1
    # 4 of 16 texts, near ties decided differently: the standard error is about 0.06.
    assert accepted / drafted == pytest.approx(checkpoint.acceptance, abs=0.15)


def test_acceptance_is_the_one_asked_for_when_calibrated(checkpoint):
    assert checkpoint.acceptance == pytest.approx(SPEC.acceptance, abs=0.05)


def test_texts_do_not_loop_when_decoded_greedily(checkpoint):
    assert checkpoint.distinct_ngrams > 0.9


@torch.inference_mode()
def test_draft_folder_holds_first_layers_when_compared_to_whole(models):
    whole, draft_model = models
    tokens = torch.tensor(make_prompts(SPEC.vocab_size, 2, NUM_PROMPT_TOKENS, seed=5))
    exit_state = whole.model(tokens, output_hidden_states=True).hidden_states[SPEC.exit_layer]
    expected = whole.lm_head(whole.model.norm(exit_state))
    assert draft_model.config.num_hidden_layers == SPEC.exit_layer
    torch.testing.assert_close(draft_model(tokens).logits, expected, rtol=0, atol=0)


def test_weights_are_those_that_the_cost_model_counts_when_loaded(checkpoint, models):
    counts = count_weights(json.loads((checkpoint.folder / "config.json").read_text()))
    whole, draft_model = models
    assert counts.total == sum(weight.numel() for weight in whole.parameters())
    assert counts.read_by_draft(SPEC.exit_layer) + counts.embedding == sum(
        weight.numel() for weight in draft_model.parameters()
    )


def test_make_checkpoint_writes_nothing_when_it_is_there(checkpoint):
    times = {path: path.stat().st_mtime_ns for path in checkpoint.folder.rglob("*")}
    again = make_checkpoint(SPEC, checkpoint.folder.parent)
    assert again == checkpoint
    assert times == {path: path.stat().st_mtime_ns for path in checkpoint.folder.rglob("*")}


def test_make_checkpoint_gives_same_bytes_when_seed_is_the_same(checkpoint, tmp_path):
    again = make_checkpoint(SPEC, tmp_path)
    assert again.late_scale == checkpoint.late_scale
    for path in checkpoint.folder.glob("*.safetensors"):
        assert (again.folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("change", [{"seed": 1}, {"acceptance": 0.7}, {"exit_layer": 2}])
def test_name_differs_when_the_checkpoint_would(change):
    assert dataclasses.replace(SPEC, **change).name() != SPEC.name()


def test_cpu_preset_has_0_6_b_weights_and_a_quarter_of_layers_when_counted():
    spec = PRESETS["cpu-0.6b"]
    counts = count_weights(
        {
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "vocab_size": spec.vocab_size,
        }
    )
    assert counts.total == pytest.approx(0.6e9, rel=0.05)
    assert spec.exit_layer * 4 == spec.num_layers


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("exit_layer", 0, "between 1 and 3"),
        ("exit_layer", 4, "between 1 and 3"),
        ("acceptance", 1.0, "between 0 and 1"),
        ("num_speculative_tokens", 0, "at least 1"),
        ("num_kv_heads", 3, "multiple of num_kv_heads, 3"),
    ],
)
def test_spec_refuses_value_when_it_cannot_be_built(field, value, remedy):
    with pytest.raises(ValueError, match=remedy):
        dataclasses.replace(SPEC, **{field: value})


def test_share_of_distinct_ngrams_counts_within_a_text_when_texts_repeat():
    assert share_of_distinct_ngrams([[1, 2, 3, 4, 5]], num_tokens=2) == 1.0
    assert share_of_distinct_ngrams([[1, 2, 1, 2, 1]], num_tokens=2) == 0.5
    assert share_of_distinct_ngrams([[1, 2, 3], [1, 2, 3]], num_tokens=2) == 1.0


def test_make_prompts_gives_same_tokens_when_seed_is_the_same():
    prompts = make_prompts(100, num_prompts=3, num_tokens=8, seed=4)
    assert prompts == make_prompts(100, num_prompts=3, num_tokens=8, seed=4)
    assert prompts != make_prompts(100, num_prompts=3, num_tokens=8, seed=5)
    assert {len(prompt) for prompt in prompts} == {8}
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)
