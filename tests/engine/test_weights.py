"""Drafts follow the target's weights at once when these change while the engine runs."""

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import assert_all_accepted
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("change", ["weights", "module"])
def test_drafts_follow_the_target_when_its_weights_change(runner, checkpoint, change):
    """With E = L all drafts are accepted, unless the stage has kept something of the old model."""
    requests = tuple(Request(tokens(15), {"max_tokens": 10}, phase=phase) for phase in (0, 1))
    scenario = Scenario(str(checkpoint()), requests, layerskip(NUM_LAYERS, 3))
    job = "tests.support.weights_job:serve_with_new_weights"
    plain = runner.run(job, scenario.plain(), change)
    drafted = runner.run(job, scenario, change)
    before, after = plain.token_ids
    assert before != after
    assert drafted.token_ids == plain.token_ids
    assert_all_accepted(drafted)
