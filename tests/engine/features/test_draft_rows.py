"""On a CPU a draft step of few requests is filled up with rows that belong to none."""

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
    requests = tuple(Request(tokens(9 + i)) for i in range(num_reqs))
    scenario = Scenario(str(checkpoint(architecture)), requests, layerskip(4, 3))
    drafted, rows = engines.run("v1", "tests.support.rows_job:serve_and_count_rows", scenario)
    (plain,) = engines.serve("v1", scenario.plain())
    # Requests leave one by one.
    assert least <= min(rows)
    assert max(rows) == most
    assert_same_outputs(plain, drafted)
