"""The same on every architecture: nothing in the drafting code knows a model."""

import pytest

from tests.support.checkpoints import NUM_LAYERS, SLIDING_WINDOW
from tests.support.checks import (
    assert_all_accepted,
    assert_same_outputs,
    assert_some_accepted_some_refused,
)
from tests.support.scenarios import Request, Scenario, layerskip, tokens

ARCHITECTURES = (
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi3",
    "olmo2",
    "mixtral",
    "qwen3-moe",
)
REQUESTS = (
    Request(tokens(3), {"max_tokens": 8}),
    Request(tokens(SLIDING_WINDOW + 30), {"max_tokens": 12}),
    Request(tokens(20), {"max_tokens": 10}, joins_at=2),
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.feature("Architectures", "{architecture}")
def test_tokens_equal_plain_when_architecture_is(runner, checkpoint, architecture):
    scenario = Scenario(str(checkpoint(architecture)), REQUESTS, layerskip(2, 3))
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert_some_accepted_some_refused(drafted)
    # Varied outputs: a model that repeats itself would hide a wrong position or block.
    assert len({token_id for (token_ids,) in plain.token_ids for token_id in token_ids}) >= 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drafts_are_all_accepted_when_all_layers_draft(runner, checkpoint, architecture):
    scenario = Scenario(str(checkpoint(architecture)), REQUESTS, layerskip(NUM_LAYERS, 3))
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert_all_accepted(drafted)


@pytest.mark.feature("KV cache", "several KV cache groups (sliding windows)")
def test_prefix_spans_two_kv_cache_groups_when_windows_alternate(runner, checkpoint):
    """Gemma 2 keeps layers with and without a sliding window in KV cache groups of their own.

    Prompts and outputs leave the window behind: blocks before it are freed while drafts go on. At
    last a prompt comes again, and finds other blocks cached in one group than in the other.
    """
    requests = (
        Request(tokens(3 * SLIDING_WINDOW + 5), {"max_tokens": 12}),
        Request(tokens(SLIDING_WINDOW - 5), {"max_tokens": 12}, joins_at=1),
        Request(tokens(2 * SLIDING_WINDOW), {"max_tokens": 6}, joins_at=2),
        Request(tokens(3 * SLIDING_WINDOW + 5), {"max_tokens": 8}, phase=1),
    )
    engine = {"max_num_batched_tokens": 48, "enable_prefix_caching": True}
    model = str(checkpoint("gemma2"))
    for exit_layer in (3, NUM_LAYERS):
        scenario = Scenario(model, requests, layerskip(exit_layer, 4), engine)
        plain, drafted = runner.pair(scenario)
        prefix = [f"model.layers.{index}." for index in range(exit_layer)]
        groups_of_prefix = [
            any(name.startswith(tuple(prefix)) for name in names)
            for names in drafted.layers_by_group
        ]
        assert groups_of_prefix == [True, True]
        assert drafted.num_blocks == plain.num_blocks
        assert drafted.outputs[3].num_cached_tokens > 0
        assert_same_outputs(plain, drafted)
    assert_all_accepted(drafted)
