"""The chi-square test by which samples are compared, against values worked by hand."""

import random

import pytest

from layerskip_vllm.tools.verify.statistics import compare_samples


def sample(counts: dict[int, int]) -> list[tuple[int, ...]]:
    return [(token,) for token, count in counts.items() for _ in range(count)]


def test_p_value_is_the_tables_when_worked_by_hand():
    """Two cells of 40 and 60 against 60 and 40: chi-square 8 with one degree of freedom."""
    result = compare_samples(sample({1: 40, 2: 60}), sample({1: 60, 2: 40}), window=1)
    assert result.p_value == pytest.approx(0.004677735, rel=1e-6)
    assert result.distance == pytest.approx(0.2)


def test_p_value_is_the_tables_when_samples_differ_in_size():
    """30, 30, 40 against 90, 60, 50: expected 40, 30, 30 and 80, 60, 60; chi-square 8.75."""
    counts = sample({1: 30, 2: 30, 3: 40}), sample({1: 90, 2: 60, 3: 50})
    result = compare_samples(*counts, window=1)
    assert result.p_value == pytest.approx(0.01258814, rel=1e-5)


def test_p_values_are_as_likely_as_they_say_when_nothing_differs():
    """Of 400 comparisons of like samples 40 should be below 0.1; 6 sigma is 36 to either side."""
    draw = random.Random(0)
    weights = [2.0**-i for i in range(6)]

    def like() -> list[tuple[int, ...]]:
        return [(token,) for token in draw.choices(range(6), weights, k=300)]

    p_values = [compare_samples(like(), like(), window=1).p_value for _ in range(400)]
    assert 4 < sum(p < 0.1 for p in p_values) < 76
