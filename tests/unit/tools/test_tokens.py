"""Where two completions differ first."""

import pytest

from layerskip_vllm.tools.tokens import first_difference


@pytest.mark.parametrize(
    ("left", "right", "position"),
    [
        ([1, 2, 3], (1, 2, 3), 3),
        ([1, 2, 3], [1, 5, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1], 1),
        ([], [], 0),
        ([], [1], 0),
    ],
)
def test_first_difference_is_found_or_the_shorter_ones_end(left, right, position):
    assert first_difference(left, right) == position
