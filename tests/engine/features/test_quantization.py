"""Quantised weights and KV caches: drafts read what the target does."""

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import (
    assert_all_accepted,
    assert_same_outputs,
    assert_some_accepted_some_refused,
)
from tests.support.quantized import quantize_to_int8
from tests.support.scenarios import Request, Scenario, layerskip, tokens

REQUESTS = tuple(
    Request(tokens(length, length), {"max_tokens": 16}, joins_at=order)
    for order, length in enumerate((20, 7, 41))
)


@pytest.mark.feature("Models and weights", "quantised weights (int8, compressed-tensors)")
def test_tokens_equal_plain_when_weights_are_int8(runner, checkpoint, tmp_path):
    model = quantize_to_int8(checkpoint(), tmp_path / "int8")
    plain, drafted = runner.pair(Scenario(str(model), REQUESTS, layerskip(2, 4)))
    assert_same_outputs(plain, drafted)
    assert_some_accepted_some_refused(drafted)
    (whole,) = runner.serve(Scenario(str(checkpoint()), REQUESTS))
    assert whole.token_ids != plain.token_ids


@pytest.mark.feature("KV cache", "fp8 KV cache")
def test_tokens_equal_plain_when_the_kv_cache_is_fp8(runner, checkpoint):
    """With E = L a draft is refused if it has read or written another cache than the target."""
    engine = {"kv_cache_dtype": "fp8"}
    for exit_layer in (2, NUM_LAYERS):
        scenario = Scenario(str(checkpoint()), REQUESTS, layerskip(exit_layer, 4), engine)
        plain, drafted = runner.pair(scenario)
        assert_same_outputs(plain, drafted)
        if exit_layer == NUM_LAYERS:
            assert_all_accepted(drafted)
        else:
            assert_some_accepted_some_refused(drafted)
    (whole,) = runner.serve(Scenario(str(checkpoint()), REQUESTS))
    assert whole.token_ids != plain.token_ids
