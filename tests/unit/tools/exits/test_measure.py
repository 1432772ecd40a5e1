"""Shares, drafts and reports of tiny models, against numbers worked by hand or the slow way."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip_vllm.checkpoint.validation import parse
from layerskip_vllm.tools.exits.command import ExitsConfig
from layerskip_vllm.tools.exits.exit_report import Draft, Exit, ExitReport
from layerskip_vllm.tools.exits.measure import (
    find_eos_token_ids,
    load_decoder,
    measure_exits,
    play_drafts,
    read_draft_shares,
)
from layerskip_vllm.tools.output import write_json
from layerskip_vllm.tools.text import HeldOutText
from layerskip_vllm.training.exit_evaluation import Acceptance, complete_greedily, exit_matches

NUM_LAYERS = 4
CONFIG = ExitsConfig(
    seq_len=8,
    max_held_out_tokens=32,
    num_prompts=5,
    num_prompt_tokens=6,
    max_tokens=12,
    max_num_speculative_tokens=3,
    batch_size=2,
)
TEXT = HeldOutText(torch.randint(16, (120,), generator=torch.Generator().manual_seed(1)), [])
SETTING = {"data": ["a.txt"], "dtype": "float32", "num_prompts": 5}


def make_model(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | config)).eval()


@pytest.mark.parametrize("is_tied", [False, True])
def test_draft_shares_are_head_and_layers_by_all_when_counted_by_hand(is_tied):
    # Attention 8*8 + 2 * 8*4 + 8*8, MLP 3 * 8*12, two norms of 8; the head 16*8.
    layer, head = 192 + 288 + 16, 128
    whole = 4 * layer + head

    shares = read_draft_shares(make_model(tie_word_embeddings=is_tied))

    assert shares == pytest.approx([(num * layer + head) / whole for num in range(5)])
    assert shares[-1] == 1


def test_drafts_promise_tokens_by_bytes_when_worked_by_hand():
    # K = 1: hit, hit at 3, miss at 5 (place 1, 3, 5): 2 of 3. K = 2: two at 1, none at 4: 2 of 4.
    matches = torch.tensor([False, True, True, True, False, False])

    first, second = play_drafts(2, [matches], draft_share=0.25, max_num_speculative_tokens=2)

    assert first.acceptance == Acceptance(pytest.approx(2 / 3), [pytest.approx(2 / 3)], 3)
    assert first.speedup == pytest.approx((2 / 3 + 1) / 1.25)
    assert second.acceptance == Acceptance(0.5, [0.5, 0.5], 2)
    assert second.speedup == pytest.approx((1 + 1) / 1.5)
    assert (second.exit_layer, second.num_speculative_tokens) == (2, 2)


def test_drafts_promise_less_than_nothing_when_no_round_fits():
    (draft,) = play_drafts(1, [torch.tensor([True])], 0.25, 1)
    assert draft.speedup == pytest.approx(1 / 1.25)


def test_report_is_what_its_parts_give_when_measured_one_at_a_time():
    model, done = make_model(), {}

    def track(what, total):
        done[what] = (0, total)

        def advance(num):
            done[what] = (done[what][0] + num, total)

        return advance

    prompts = TEXT.cut_prompts(5, 6)
    eos = complete_greedily(model, prompts[0], 12, 16)[4]  # some texts end early, some may not
    report = measure_exits(model, TEXT, {eos}, CONFIG, SETTING, track)

    sequences = TEXT.cut_sequences(8, 32)
    with torch.inference_mode():
        logits = model(sequences[:, :-1]).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, sequences[:, 1:].flatten()).item()
    matches = [exit_matches(model, [ids], 12, eos)[0] for ids in prompts]
    assert [exit_.exit_layer for exit_ in report.exits] == [1, 2, 3, 4]
    assert report.exits[-1].loss == pytest.approx(loss, rel=1e-5)
    assert report.exits[-1].perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert report.exits[-1].agreement == 1
    assert report.exits[-1].drafts == ()
    shares = read_draft_shares(model)
    for exit_ in report.exits[:-1]:
        assert exit_.draft_share == shares[exit_.exit_layer]
        rows = [each[exit_.exit_layer - 1] for each in matches]
        assert exit_.drafts == play_drafts(exit_.exit_layer, rows, exit_.draft_share, 3)
    assert report.head_share == shares[0]
    assert report.num_held_out_tokens == 32
    assert report.num_completion_tokens == sum(each.shape[1] for each in matches) < 5 * 12
    assert done == {"held-out text": (4, 4), "completions": (5, 5)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_prompts": 0}, "num_prompts is 0; it must be an integer of at least 1"),
        ({"batch_size": -1}, "batch_size is -1; it must be an integer of at least 1"),
        ({"max_tokens": 8}, "max_num_speculative_tokens is 8; it must be below max_tokens.* is 8"),
    ],
)
def test_config_is_refused_when_a_number_is_bad(fields, message):
    with pytest.raises(ValueError, match=message):
        parse(ExitsConfig, fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_len": 33}, "seq_len is 33; it must be at most 32"),
        (
            {"num_prompt_tokens": 21},
            "num_prompt_tokens and max_tokens are 21 and 12; together they must be at most 32",
        ),
    ],
)
def test_texts_are_refused_when_longer_than_the_context(fields, message):
    config = ExitsConfig(**{**CONFIG.__dict__, **fields})
    with pytest.raises(ValueError, match=message):
        measure_exits(make_model(), TEXT, {3}, config, SETTING)


def test_model_is_refused_when_it_has_one_layer():
    with pytest.raises(ValueError, match="model has 1 layer; it must have at least 2"):
        measure_exits(make_model(num_hidden_layers=1), TEXT, {3}, CONFIG, SETTING)


def test_data_is_refused_when_the_model_ends_every_text_at_once():
    with pytest.raises(ValueError, match="data has prompts that the model ends at once"):
        measure_exits(make_model(), TEXT, set(range(16)), CONFIG, SETTING)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_device_is_refused_when_there_is_none(device):
    with pytest.raises(ValueError, match=f"device is {device!r}, which this machine"):
        load_decoder("checkpoints/stdlib-24l", device, "auto")


@pytest.mark.parametrize(
    ("given", "of_tokenizer", "expected"),
    [([4, 5], 6, {4, 5, 6}), (4, 4, {4}), (None, None, set())],
)
def test_texts_end_at_all_tokens_that_end_one_when_several_do(given, of_tokenizer, expected):
    model = make_model()
    model.generation_config.eos_token_id = given
    tokenizer = type("Tokenizer", (), {"eos_token_id": of_tokenizer})
    assert find_eos_token_ids(model, tokenizer) == expected


def make_report(*speedups: list[float], loss: float = 2.0) -> ExitReport:
    """A report of one exit a list, with the speed-ups by K, and of the whole model."""
    exits = [
        Exit(
            num,
            loss,
            0.5,
            0.1 * num,
            tuple(
                Draft(num, k, Acceptance(0.5, [0.5] * k, 9), speedup)
                for k, speedup in enumerate(row, start=1)
            ),
        )
        for num, row in enumerate(speedups, start=1)
    ]
    whole = Exit(len(exits) + 1, 1.5, 1.0, 1.0, ())
    return ExitReport("folder/tiny", SETTING, 32, 60, 0.05, (*exits, whole))


def test_best_is_the_earliest_and_shortest_when_several_promise_the_same():
    report = make_report([1.1, 1.2, 1.0], [1.3, 1.4, 1.4], [1.4, 1.4, 1.2])
    assert (report.best.exit_layer, report.best.num_speculative_tokens) == (2, 2)
    assert report.entry == {"exit_layer": 2, "num_speculative_tokens": 2}
    assert report.describe() == (
        "Exit after layer 2 of 4, draft 2 tokens: at best 1.40 times plain decoding"
    )


def test_there_is_no_entry_when_no_exit_pays():
    report = make_report([0.8, 0.9], [1.0, 0.7])
    assert not report.pays
    assert report.entry is None
    assert (
        report.describe() == "No exit pays: at best 1.00 times plain decoding, after layer 2 of 3"
    )


def test_json_is_standard_when_a_perplexity_is_beyond_all_numbers(tmp_path):
    def refuse(name):
        raise AssertionError(name)

    write_json(tmp_path / "exits.json", make_report([1.2], loss=1000.0).to_json())
    written = json.loads((tmp_path / "exits.json").read_text(), parse_constant=refuse)
    first, last = written["exits"]
    assert first["perplexity"] is None
    assert last["perplexity"] == pytest.approx(math.exp(1.5))
    assert first["drafts"] == [
        {
            "num_speculative_tokens": 1,
            "acceptance": {"rate": 0.5, "rate_by_position": [0.5], "num_rounds": 9},
            "speedup": 1.2,
        }
    ]
    assert written["layerskip"] == {"exit_layer": 1, "num_speculative_tokens": 1}
