"""Which differences from plain vLLM are losses, on outputs made for the purpose."""

from __future__ import annotations

import pytest

from layerskip_vllm.tools.prompts import choose_prompts, cut_prompts
from layerskip_vllm.tools.verify.comparison import compare_results, find_tolerance
from layerskip_vllm.tools.verify.engine_run import EngineOutput, ScoredCompletion
from layerskip_vllm.tools.verify.statistics import compare_samples

SAMPLES = (((1, 2),) * 200, ((1, 2), (2, 1)) * 100)


def make_result(*completions, samples=SAMPLES):
    greedy = tuple(
        ScoredCompletion(tuple(tokens), tuple(dict(position) for position in logprobs))
        for tokens, logprobs in completions
    )
    return EngineOutput("V1", "cpu", "float32", None, 0, 0, 0, greedy, samples)


def compare_greedy(plain, other):
    plain = make_result(plain)
    return compare_results(plain, make_result(other), [plain])


POSITION = {1: -0.5, 2: -0.6, 3: -4.0}


def test_divergence_has_the_gap_that_plain_vllm_sees_when_the_token_is_likely():
    other = {1: -0.58, 2: -0.52, 3: -4.0}
    comparison = compare_greedy(([1, 1], [POSITION] * 2), ([1, 2], [POSITION, other]))
    (divergence,) = comparison.divergences
    assert (divergence.prompt, divergence.position) == (0, 1)
    assert divergence.gap == pytest.approx(0.1)
    assert comparison.noise == 0  # only tokens before the divergence are alike
    assert comparison.lost(0.09)
    assert not comparison.lost(0.11)


def test_divergence_has_the_least_possible_gap_when_the_token_is_unlikely():
    comparison = compare_greedy(([1], [POSITION]), ([9], [{**POSITION, 9: -9.0}]))
    assert comparison.divergences[0].gap == pytest.approx(3.5)


def test_tolerance_is_what_the_floor_shows_when_that_is_more_than_rounding():
    noisy = {1: -0.52, 2: -0.6, 3: -4.0}
    floor = compare_greedy(([1, 1], [POSITION] * 2), ([1, 1], [noisy, POSITION]))
    assert find_tolerance("float32", floor) == pytest.approx(0.04)
    turned = compare_greedy(([1, 1], [POSITION] * 2), ([1, 2], [POSITION] * 2))
    assert find_tolerance("float32", turned) == pytest.approx(0.1)


def test_tolerance_is_roundings_when_the_floor_shows_none():
    floor = compare_greedy(([1], [POSITION]), ([1], [POSITION]))
    assert find_tolerance("float32", floor) == 1e-4
    assert find_tolerance("bfloat16", floor) == 0.125


def test_samples_are_not_compared_when_all_are_alike():
    plain = make_result(samples=(SAMPLES[0],))
    comparison = compare_results(plain, plain, [plain])
    assert comparison.p_value is None
    assert comparison.distance is None


def test_p_value_is_corrected_when_there_are_several_prompts():
    left, right = ((1, 2), (2, 1)) * 100, ((1, 2), (1, 2), (2, 1)) * 100
    plain = make_result(samples=(right, right))
    p_value = compare_samples(left, right).p_value
    comparison = compare_results(plain, make_result(samples=(left, right)), [plain])
    assert comparison.p_value == pytest.approx(2 * p_value)
    assert p_value < 0.01


def test_prompts_come_from_all_over_the_text_when_it_is_the_users():
    documents = ["a" * 60, "b" * 25, " \n" * 30, "c" * 60]
    prompts = cut_prompts(documents, 13, 2)
    assert [prompt[0] for prompt in prompts] == ["a"] * 5 + ["b"] * 3 + ["c"] * 5
    assert {prompt[0] for prompt in cut_prompts(documents, 4, 2)} == {"a", "b", "c"}
    with pytest.raises(ValueError, match="num_prompts is 14, but data has text for 13"):
        cut_prompts(documents, 14, 2)


def test_prompts_are_the_built_in_ones_when_there_is_no_text():
    assert len(set(choose_prompts(None, 16, 8))) == 16
