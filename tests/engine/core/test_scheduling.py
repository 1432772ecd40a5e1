"""Drafting under vLLM's scheduler: chunked prefill, preemption, priorities, aborts, async."""

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import (
    assert_all_accepted,
    assert_same_outputs,
    assert_some_accepted_some_refused,
)
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.gpu

BLOCK_BYTES = 1 << 17  # of the tiny Llama: 32 tokens, 8 layers, 2 heads of 32, keys and values


@pytest.mark.parametrize(
    ("exit_layer", "num_speculative_tokens"), [(2, 3), (4, 7), (NUM_LAYERS, 3)]
)
@pytest.mark.feature("Scheduling", "chunked prefill")
def test_tokens_equal_plain_when_prefill_comes_in_small_chunks(
    runner, checkpoint, exit_layer, num_speculative_tokens
):
    requests = (
        Request(tokens(9), {"max_tokens": 14}),
        Request(tokens(70), {"max_tokens": 8}, joins_at=1),
        Request(tokens(45), {"max_tokens": 6}, joins_at=2),
    )
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(exit_layer, num_speculative_tokens),
        {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    )
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    # One request verified drafts in the step in which another was in the middle of its prompt.
    assert any(step.num_drafts and step.num_mid_prompt for step in drafted.steps)
    assert max(step.num_tokens for step in drafted.steps) <= 16
    if exit_layer == NUM_LAYERS:
        assert_all_accepted(drafted)


@pytest.mark.parametrize("threshold", [1, 4])
def test_tokens_equal_plain_when_a_step_takes_fewer_tokens_of_a_request_than_a_draft(
    runner, checkpoint, threshold
):
    """And of a prompt, of which two are cached but for one token."""
    requests = (
        Request(tokens(33), {"max_tokens": 5}),
        Request(tokens(33), {"max_tokens": 9}, phase=1),
        Request(tokens(33), {"max_tokens": 9}, phase=1),
        Request(tokens(5), {"max_tokens": 9}, phase=1, joins_at=1),
        Request(tokens(1), {"max_tokens": 9}, phase=1, joins_at=2),
    )
    engine = {"enable_prefix_caching": True, "long_prefill_token_threshold": threshold}
    scenario = Scenario(str(checkpoint()), requests, layerskip(4, 4), engine)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    # The whole draft of a request that is alone, and what is left room for beside others.
    lens = {num_drafts for step in drafted.steps for num_drafts in step.draft_lens}
    assert lens == {4, threshold - 1} - {0}


def test_tokens_equal_plain_when_token_budget_cuts_drafts(runner, checkpoint):
    """Room for 8 tokens a step, and three requests that would take 6 each with K = 5."""
    requests = tuple(Request(tokens(7, seed), {"max_tokens": 12}) for seed in range(3))
    for exit_layer in (2, NUM_LAYERS):
        scenario = Scenario(
            str(checkpoint()),
            requests,
            layerskip(exit_layer, 5),
            {"max_num_batched_tokens": 8, "max_num_seqs": 4},
            is_async=False,  # asynchronous scheduling leaves drafts whole or out
        )
        plain, drafted = runner.pair(scenario)
        assert_same_outputs(plain, drafted)
        assert any(0 < num_drafts < 5 for step in drafted.steps for num_drafts in step.draft_lens)
    assert_all_accepted(drafted)


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS])
@pytest.mark.feature("Scheduling", "preemption")
def test_tokens_equal_plain_when_requests_are_preempted(
    runner, checkpoint, exit_layer, enable_prefix_caching
):
    """Three requests that grow into a second block each, with four (and vLLM's null block)."""
    requests = tuple(Request(tokens(26, seed), {"max_tokens": 12}) for seed in range(3))
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(exit_layer, 3),
        {
            "kv_cache_memory_bytes": 5 * BLOCK_BYTES,
            "max_model_len": 64,
            "enable_prefix_caching": enable_prefix_caching,
        },
    )
    plain, drafted = runner.pair(scenario)
    assert plain.num_blocks == drafted.num_blocks == 5
    assert plain.num_preemptions > 0
    assert drafted.num_preemptions > 0
    assert_same_outputs(plain, drafted)


@pytest.mark.feature("Scheduling", "priority scheduling")
def test_tokens_equal_plain_when_priority_preempts(runner, checkpoint):
    """The last to come is the most urgent, and the first to come loses its blocks."""
    requests = (
        Request(tokens(26, 0), {"max_tokens": 12}, priority=2),
        Request(tokens(25, 1), {"max_tokens": 12}, priority=1),
        Request(tokens(24, 2), {"max_tokens": 12}, priority=0, joins_at=1),
    )
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(4, 3),
        {
            "kv_cache_memory_bytes": 5 * BLOCK_BYTES,
            "max_model_len": 64,
            "scheduling_policy": "priority",
        },
    )
    plain, drafted = runner.pair(scenario)
    assert drafted.num_preemptions > 0
    assert_same_outputs(plain, drafted)


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS])
@pytest.mark.feature("Scheduling", "aborts")
def test_tokens_equal_plain_when_other_requests_are_aborted(runner, checkpoint, exit_layer):
    """Clients go away in the middle of their outputs; others, and later ones, go on."""
    requests = (
        Request(tokens(20, 0), {"max_tokens": 40}, aborts_after=4),
        Request(tokens(35, 1), {"max_tokens": 12}),
        Request(tokens(12, 2), {"max_tokens": 40}, aborts_after=1),
        Request(tokens(25, 3), {"max_tokens": 10}, joins_at=3),
        Request(tokens(50, 4), {"max_tokens": 8}, joins_at=4),
    )
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(exit_layer, 3),
        {"max_num_seqs": 3, "kv_cache_memory_bytes": 12 * BLOCK_BYTES},
    )
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert drafted.aborted_token_ids.keys() == plain.aborted_token_ids.keys() == {0, 2}
    for index, found in drafted.aborted_token_ids.items():
        expected = plain.aborted_token_ids[index]
        assert found[: len(expected)] == expected


@pytest.mark.parametrize(
    ("exit_layer", "num_speculative_tokens"), [(2, 3), (4, 5), (NUM_LAYERS, 4)]
)
@pytest.mark.feature("Scheduling", "asynchronous scheduling")
def test_tokens_equal_plain_when_scheduling_is_async(
    runner, checkpoint, exit_layer, num_speculative_tokens
):
    """vLLM turns asynchronous scheduling off on the CPU; on GPUs it is the default.

    All tests on Model Runner V2 draft with it, this one on V1 too.
    """
    requests = (
        Request(tokens(3), {"max_tokens": 12}),
        Request(tokens(17), {"max_tokens": 1}),
        Request(tokens(70), {"max_tokens": 9}, joins_at=1),
        Request(tokens(32), {"max_tokens": 3}, joins_at=2),
        Request(tokens(55), {"max_tokens": 12}, joins_at=2),
    )
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(exit_layer, num_speculative_tokens),
        {"max_num_seqs": 3, "max_num_batched_tokens": 32},
        is_async=True,
    )
    plain, drafted = runner.pair(scenario)
    assert drafted.is_async
    assert not plain.is_async
    assert_same_outputs(plain, drafted)
    if exit_layer == NUM_LAYERS:
        assert_all_accepted(drafted)
    else:
        assert_some_accepted_some_refused(drafted)
