"""Steps of decoding on paper, against hand values."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.decoding.devices_and_models import H100, LLAMA_3_1_8B, LLAMA_3_1_70B
from benchmarks.decoding.measured_speeds import MIN_NUM_REUSED, compare_study, fit_cpu
from benchmarks.decoding.scale_on_paper import Case, tell_limits, write_predictions
from benchmarks.decoding.scale_picture import make_scale_figure
from benchmarks.decoding.step_model import Device, Drafting, StepModel, expected_tokens
from benchmarks.decoding.synthetic_spec import PRESETS
from layerskip_vllm.drafting.verifier import MIN_NUM_KEPT
from layerskip_vllm.tools.speedup_bound import bound_speedup

# A layer has 2 * 8 * 2 * 4 + 2 * 8 * 1 * 4 + 3 * 8 * 16 + 2 * 8 = 592 weights, the head with its
# norm 32 * 8 + 8 = 264; a token has 2 * 1 * 4 = 8 keys and values in a layer.
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 32,
}
# A value of two bytes, or a product and its sum, a second.
SLOW = Device("slow", bytes_per_s=2, flops_per_s=2)
READER = Device("computes in no time", bytes_per_s=2, flops_per_s=float("inf"))


def test_seconds_are_the_sum_or_a_round_knee_by_overlap_power():
    assert SLOW.seconds(6, 8) == pytest.approx(3 + 4)
    assert replace(SLOW, overlap_power=2).seconds(6, 8) == pytest.approx(5)
    assert replace(SLOW, overlap_power=100).seconds(6, 8) == pytest.approx(4, rel=1e-3)


def test_plain_step_reads_weights_once_and_keys_by_request_when_counted_by_hand():
    # Reading: 2 * (592 + 3 * 10 * 8) + 264. Computing, 3 rows: 2 * 592 * 3 + 264 * 3, and in each
    # layer 3 rows' products with 10 keys and 10 values of 2 heads of 4.
    reading, products = 2 * (592 + 240) + 264, 3 * (2 * 592 + 264) + 2 * 3 * 2 * 10 * 8
    assert StepModel(TINY, SLOW).target_s(3, 10) == pytest.approx(reading + products)
    assert StepModel(TINY, READER).target_s(3, 10) == pytest.approx(reading)


def test_verification_reads_no_more_than_a_plain_step():
    model = StepModel(TINY, READER)
    assert model.target_s(3, 10, num_drafts=4) == pytest.approx(model.target_s(3, 10))


def test_gain_is_the_bound_on_bytes_when_nothing_else_costs():
    model, drafting = StepModel(LLAMA_3_1_8B, READER), Drafting(exit_layer=8)
    speeds = [model.speed(1, 0, drafting, k, acceptance=0.8) for k in (0, 3)]
    share = model.counts.shares(exit_layer=8).total
    accepted = 0.8 + 0.8**2 + 0.8**3
    assert speeds[1] / speeds[0] == pytest.approx(bound_speedup(share, 3, accepted))


def test_draft_vocab_takes_its_share_of_the_head_from_each_draft_step():
    model = StepModel(TINY, READER)
    whole, quarter = (model.round_s(1, 0, Drafting(1, share), 3) for share in (1.0, 0.25))
    assert whole - quarter == pytest.approx(3 * 0.75 * 264)


def test_reused_exit_states_save_the_first_layers_of_all_drafts_but_the_last():
    # Operations alone: K tokens of 2 requests do not go through one layer again.
    model = StepModel(TINY, SLOW)
    off, on = (model.round_s(2, 0, Drafting(1, reuses_exit_states=r), 3) for r in (False, True))
    assert off - on == pytest.approx(2 * 3 * 592)


def test_draft_model_runs_the_last_verification_again():
    model = StepModel(TINY, SLOW)
    shared, own = (model.round_s(2, 0, Drafting(1, has_own_cache=c), 3) for c in (False, True))
    assert own - shared == pytest.approx(2 * 4 * 592)


def test_tensor_parallelism_divides_weights_and_adds_all_reduces():
    device = replace(READER, all_reduce_s=1, link_bytes_per_s=2)
    # Two ranks: half of the weights, the one head of keys whole. Six all-reduces of 5 rows of 8
    # values: of them each rank sends 2 * (1 - 1 / 2) = 1 times their 80 bytes.
    reading = (2 * 592 + 264) / 2 + 2 * 5 * 10 * 8
    expected = reading + 6 * (1 + 80 / 2)
    assert StepModel(TINY, device, num_ranks=2).target_s(5, 10) == pytest.approx(expected)


def test_overheads_count_by_layer_step_and_draft_step():
    device = replace(READER, layer_s=1000, step_s=10, draft_step_s=1)
    bare, full = (StepModel(TINY, each).round_s(1, 0, Drafting(1), 3) for each in (READER, device))
    assert full - bare == pytest.approx(3 * 1001 + 2 * 1000 + 10)


def test_model_fits_as_long_as_weights_and_keys_do():
    values = 2 * 592 + 2 * 264 - 8  # embedding and head, with one norm
    room = (values + 3 * 10 * 2 * 8) * 2 / 0.92
    model = StepModel(TINY, replace(SLOW, memory_bytes=room * 1.001))
    assert model.fits(3, 10)
    assert not model.fits(3, 11)
    assert not StepModel(LLAMA_3_1_70B, H100).fits(1, 1)
    assert StepModel(LLAMA_3_1_70B, H100, num_ranks=8).fits(1, 1)


def test_expected_tokens_are_the_targets_own_and_each_draft_that_is_reached():
    assert expected_tokens(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens(0.5, 0) == 1


def make_study(seconds_of, counters=None, system="layerskip+auto", speed=1.0):
    """A study of `make bench` whose plain steps take what is told."""
    lines = [
        {"load": {"batch_size": b, "num_prompt_tokens": 16}, "system": "plain", "speedup": 1.0}
        | {"tokens_per_s": b / seconds_of(b)}
        for b in (1, 4, 16, 32)
    ]
    none = {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens": 0}
    rounds = [{"load": line["load"], "system": "plain", "counters": none} for line in lines]
    if counters:
        load = {"batch_size": 2, "num_prompt_tokens": 16}
        lines.append({"load": load, "system": system, "tokens_per_s": speed, "speedup": 1.0})
        rounds.append({"load": load, "system": system, "counters": counters})
    command = "python -m benchmarks.decoding.speedup --preset cpu-0.6b --max-tokens 49"
    return {"hardware": "a CPU", "command": command, "summary": lines, "rounds": rounds}


def test_fit_cpu_finds_the_rates_that_the_plain_steps_have():
    device, config = fit_cpu(make_study(lambda batch_size: 0.02 + 0.001 * batch_size))
    whole = StepModel(config, device).counts.whole
    assert config["num_hidden_layers"] == PRESETS["cpu-0.6b"].num_layers
    assert 2 * whole / device.bytes_per_s == pytest.approx(0.02)
    assert 2 * whole / device.flops_per_s == pytest.approx(0.001)


def test_fit_cpu_refuses_steps_that_get_shorter():
    with pytest.raises(ValueError, match="1, 4, 16, 32 requests do not take longer"):
        fit_cpu(make_study(lambda batch_size: 0.02 - 0.0001 * batch_size))


@pytest.mark.parametrize(("system", "num_drafts"), [("layerskip+auto", 4), ("layerskip", 24)])
def test_compare_study_counts_steps_without_drafts(system, num_drafts):
    # 2 requests of 48 tokens after the first; drafts of 3 of which all are accepted.
    counters = {"num_drafts": num_drafts, "num_draft_tokens": 3 * num_drafts}
    counters["num_accepted_tokens"] = 3 * num_drafts
    study = make_study(lambda batch_size: 0.02 + 0.001 * batch_size, counters, system, speed=50.0)
    line = compare_study(study)[-1]
    device, config = fit_cpu(study)
    model, size = StepModel(config, device), (2, 16 + 49 // 2)
    seconds = num_drafts / 2 * model.round_s(*size, Drafting(4), 3)
    seconds += (96 - 4 * num_drafts) / 2 * model.target_s(*size)
    assert line.what == f"{system}, batch 2"
    assert line.predicted == pytest.approx(96 / seconds)
    assert line.error == pytest.approx(96 / seconds / 50 - 1)
    assert line.predicted_gain == pytest.approx(48 * model.target_s(*size) / seconds)


def test_compare_study_leaves_out_systems_that_the_model_does_not_know():
    counters = {"num_drafts": 1, "num_draft_tokens": 1, "num_accepted_tokens": 1}
    study = make_study(lambda batch_size: 0.02 + 0.001 * batch_size, counters, "ngram")
    assert {line.what.partition(",")[0] for line in compare_study(study)} == {"plain"}


def test_reuse_begins_where_the_drafter_has_it_begin():
    assert MIN_NUM_REUSED == MIN_NUM_KEPT


def test_limits_are_the_last_batches_that_gain_when_operations_take_over():
    case = Case("tiny", StepModel(TINY, replace(SLOW, flops_per_s=40)))
    case = replace(case, model=replace(case.model, config=TINY | {"num_hidden_layers": 8}))
    clear, any_gain = (int(each) for each in tell_limits(case, 0, 0.9, 4).split(", "))
    assert 0 < clear < any_gain
    assert case.gain(clear, 0, 4, 0.9) >= 1.1 > case.gain(clear + 1, 0, 4, 0.9)
    assert case.gain(any_gain, 0, 4, 0.9) > 1 > case.gain(any_gain + 1, 0, 4, 0.9)


def test_limits_have_a_plus_when_memory_ends_first():
    case = Case("70B", StepModel(LLAMA_3_1_70B, H100, num_ranks=8))
    assert tell_limits(case, 14000, 0.9, 4) == "97+, 97+"


def test_best_k_is_none_when_drafts_are_useless():
    case = Case("8B", StepModel(LLAMA_3_1_8B, H100))
    assert case.best_gain(16, 1000, acceptance=0.01) == (1.0, 0)
    assert case.best_gain(16, 1000, acceptance=0.9)[1] > 2


def test_picture_has_a_chart_a_model():
    case = Case("8B", StepModel(LLAMA_3_1_8B, H100))
    comparisons = {name: compare_study(make_study(lambda b: 0.02 + 0.001 * b)) for name in "abcd"}
    figure = make_scale_figure(comparisons, [case, case], (1000, 14000))
    assert len(figure.get_axes()) == 3


def test_page_has_what_the_command_prints_of_gpus():
    page = (Path(__file__).parents[3] / "docs/scale.md").read_text(encoding="utf-8")
    missing = [line for line in write_predictions() if line not in page]
    assert not missing, "python -m benchmarks.decoding.scale_on_paper prints other figures"
