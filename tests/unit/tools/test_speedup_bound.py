"""The bound from bytes read, worked by hand: a draft step reads 0.28 of a whole step."""

import pytest

from layerskip_vllm.tools.speedup_bound import bound_speedup, cost_of_round


def test_cost_of_round_adds_drafts_to_whole_model_when_counted_by_hand():
    assert cost_of_round(0.28, num_speculative_tokens=3) == pytest.approx(1.84)


def test_bound_speedup_is_tokens_by_cost_when_counted_by_hand():
    assert bound_speedup(0.28, 3, accepted=2.0) == pytest.approx(3 / 1.84)


def test_bound_speedup_is_below_one_when_nothing_is_accepted():
    assert bound_speedup(0.28, 3, accepted=0.0) == pytest.approx(1 / 1.84)


def test_bound_speedup_is_one_when_drafts_are_the_whole_model():
    assert bound_speedup(1.0, 4, accepted=4.0) == pytest.approx(1.0)


@pytest.mark.parametrize("draft_share", [0.0, 1.1, float("nan")])
def test_bound_speedup_refuses_draft_share_when_it_is_no_share(draft_share):
    with pytest.raises(ValueError, match=r"draft_share is .*above 0 and at most 1"):
        bound_speedup(draft_share, 4, accepted=1.0)


def test_bound_speedup_refuses_num_speculative_tokens_when_it_is_zero():
    with pytest.raises(ValueError, match=r"num_speculative_tokens is 0.*at least 1"):
        bound_speedup(0.28, 0, accepted=0.0)


@pytest.mark.parametrize("accepted", [-0.1, 4.1])
def test_bound_speedup_refuses_accepted_when_a_round_cannot_accept_it(accepted):
    with pytest.raises(ValueError, match=r"accepted is .*between 0 and 4"):
        bound_speedup(0.28, 4, accepted=accepted)
