"""Requests that reach the end of the context, or of a KV cache block, inside a draft."""

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import assert_all_accepted, assert_same_outputs
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.gpu

MAX_MODEL_LEN = 64


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS])
def test_tokens_equal_plain_when_context_ends_inside_a_draft(runner, checkpoint, exit_layer):
    """Room for 1, 2, 4 and 9 tokens with K = 5, beside a request that has room for all."""
    requests = (
        *(Request(tokens(MAX_MODEL_LEN - room), {"max_tokens": 99}) for room in (1, 2, 4, 9)),
        Request(tokens(5), {"max_tokens": 16}),
    )
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(exit_layer, 5),
        {"max_model_len": MAX_MODEL_LEN},
    )
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert [len(token_ids) for (token_ids,) in drafted.token_ids] == [1, 2, 4, 9, 16]
    assert all(o.completions[0].finish_reason == "length" for o in drafted.outputs)
    # Some drafts were cut, and the request with room got whole ones all the same.
    assert min(min(step.draft_lens, default=5) for step in drafted.steps) < 5
    assert all(max(step.draft_lens, default=5) == 5 for step in drafted.steps)
    if exit_layer == NUM_LAYERS:
        assert_all_accepted(drafted)
        assert len(drafted.steps) <= 1 + 3 + 1  # 16 tokens: one, then three times six at most


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS])
def test_tokens_equal_plain_when_vllm_has_fitted_the_context_to_the_memory(
    runner, checkpoint, exit_layer
):
    """`max_model_len` -1: the engine is made for the model's context, and then gets a shorter."""
    requests = tuple(Request(tokens(room, room), {"max_tokens": 999}) for room in (100, 121, 125))
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(exit_layer, 5),
        {"max_model_len": -1, "kv_cache_memory_bytes": 5 << 17},  # null block and four
    )
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert [len(token_ids) for (token_ids,) in drafted.token_ids] == [28, 7, 3]
    if exit_layer == NUM_LAYERS:
        assert_all_accepted(drafted)


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS])
def test_tokens_equal_plain_when_outputs_end_at_block_boundaries(runner, checkpoint, exit_layer):
    """Ends before, at and after the end of a block of 32 tokens; then the blocks are used again."""
    requests = tuple(
        Request(tokens(prompt_len, phase), {"max_tokens": end - prompt_len}, phase=phase)
        for phase in (0, 1)
        for prompt_len, end in ((27, 31), (26, 32), (24, 33), (31, 40), (32, 38))
    )
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(exit_layer, 4),
        {"kv_cache_memory_bytes": 12 << 17},  # 12 blocks of 2^17 bytes
    )
    plain, drafted = runner.pair(scenario)
    assert drafted.num_blocks == plain.num_blocks == 12
    assert drafted.num_preemptions == 0
    assert_same_outputs(plain, drafted)
