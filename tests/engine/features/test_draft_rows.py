"""Rows of draft steps that draft for nothing."""

import pytest

from tests.support.checks import assert_same_outputs
from tests.support.scenarios import Request, Scenario, layerskip, tokens


@pytest.mark.parametrize(
    ("architecture", "num_reqs", "least", "most"),
    [("llama", 1, 4, 4), ("llama", 6, 4, 6), ("mixtral", 1, 1, 1)],
)
def test_draft_step_has_four_rows_when_a_dense_model_has_fewer_requests(
    engines, checkpoint, architecture, num_reqs, least, most
):
    """On a CPU it is filled up with rows that belong to none."""
    requests = tuple(Request(tokens(9 + i)) for i in range(num_reqs))
    scenario = Scenario(str(checkpoint(architecture)), requests, layerskip(4, 3))
    drafted, rows = engines.run("v1", "tests.support.rows_job:serve_and_count_rows", scenario)
    (plain,) = engines.serve("v1", scenario.plain())
    # Requests leave one by one.
    assert least <= min(rows)
    assert max(rows) == most
    assert_same_outputs(plain, drafted)


def test_rows_are_padding_when_their_requests_draft_for_nothing(engines, checkpoint):
    """In the middle of a prompt, and at the end of the context; experts leave such rows out."""
    requests = (
        Request(tokens(9), {"max_tokens": 30}),
        Request(tokens(40), {"max_tokens": 24}, joins_at=2),
    )
    engine = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 64}
    scenario = Scenario(str(checkpoint("mixtral")), requests, layerskip(4, 3), engine)
    drafted, steps = engines.run("v2", "tests.support.rows_job:serve_and_see_padding", scenario)
    (plain,) = engines.serve("v2", scenario.plain())
    assert_same_outputs(plain, drafted)
    assert all(is_padding == [not row for row in drafts] for drafts, is_padding in steps)
    assert {row for drafts, _ in steps for row in drafts} == {True, False}
