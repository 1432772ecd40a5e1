"""Greedy tokens are plain vLLM's, whatever E and K are, while requests come and go."""

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import (
    assert_all_accepted,
    assert_same_outputs,
    assert_some_accepted_some_refused,
)
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.gpu

# Prompts of different lengths, some of them longer than a KV cache block (32 tokens) or ending with
# one; outputs that end before the first draft, inside one, and after several.
REQUESTS = (
    Request(tokens(3), {"max_tokens": 12}),
    Request(tokens(17), {"max_tokens": 1}),
    Request(tokens(40), {"max_tokens": 9}, joins_at=1),
    Request(tokens(32), {"max_tokens": 3}, joins_at=2),
    Request(tokens(55), {"max_tokens": 12}, joins_at=2),
    Request(tokens(9), {"max_tokens": 10}, joins_at=5),
)
# Fewer rows than requests, so that rows are used again.
ENGINE = {"max_num_seqs": 3}


@pytest.mark.parametrize(("exit_layer", "num_speculative_tokens"), [(1, 1), (2, 3), (4, 5), (7, 2)])
def test_tokens_equal_plain_when_requests_join_and_leave(
    runner, checkpoint, exit_layer, num_speculative_tokens
):
    speculative = layerskip(exit_layer, num_speculative_tokens)
    plain, drafted = runner.pair(Scenario(str(checkpoint()), REQUESTS, speculative, ENGINE))
    assert_same_outputs(plain, drafted)
    assert_some_accepted_some_refused(drafted)
    assert len(drafted.steps) < len(plain.steps)


def test_drafts_are_all_accepted_when_exit_layer_is_the_last(runner, checkpoint):
    speculative = layerskip(NUM_LAYERS, 4)
    plain, drafted = runner.pair(Scenario(str(checkpoint()), REQUESTS, speculative, ENGINE))
    assert_same_outputs(plain, drafted)
    assert_all_accepted(drafted)
    assert drafted.num_accepted_per_pos == (drafted.num_drafts,) * 4


@pytest.mark.parametrize(("exit_layer", "num_speculative_tokens"), [(2, 3), (4, 5)])
def test_runners_agree_when_scenario_is_the_same(
    engines, checkpoint, exit_layer, num_speculative_tokens
):
    speculative = layerskip(exit_layer, num_speculative_tokens)
    scenario = Scenario(str(checkpoint()), REQUESTS, speculative, ENGINE, is_async=False)
    engines.start("v2", scenario)
    (v1,), (v2,) = engines.serve("v1", scenario), engines.serve("v2", scenario)
    assert (v1.runner, v2.runner) == ("v1", "v2")
    assert v1.token_ids == v2.token_ids
    assert v1.counts == v2.counts
    assert v1.steps == v2.steps


def test_tokens_equal_plain_when_draft_is_longer_than_any_output(runner, checkpoint):
    """K = 6 with outputs of at most 3 tokens, whose drafts are cut by nothing but the end."""
    requests = (
        Request(tokens(20), {"max_tokens": 3}),
        Request(tokens(6), {"max_tokens": 2}, joins_at=1),
        Request(tokens(33), {"max_tokens": 1}, joins_at=1),
    )
    for exit_layer in (2, NUM_LAYERS):
        scenario = Scenario(str(checkpoint()), requests, layerskip(exit_layer, 6))
        plain, drafted = runner.pair(scenario)
        assert_same_outputs(plain, drafted)
        assert [len(token_ids) for (token_ids,) in drafted.token_ids] == [3, 2, 1]
    assert_all_accepted(drafted)
