"""Verification that begins at the exit, with the states that drafting has left there."""

from dataclasses import replace

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import (
    assert_same_outputs,
    assert_some_accepted_some_refused,
)
from tests.support.scenarios import Request, Scenario, layerskip, tokens

COUNT = "tests.support.reuse_job:serve_and_count_verifications"
BLOCK_BYTES = 1 << 17  # of the tiny Llama: 32 tokens, 8 layers, 2 heads of 32, keys and values


def few(num_drafts):
    return {"extra_args": {"layerskip": {"num_speculative_tokens": num_drafts}}}


# Requests that join in the middle of others' drafts, in chunks, leave, and take their rows; with
# drafts of their own length, or none.
REQUESTS = (
    Request(tokens(9), {"max_tokens": 30}),
    Request(tokens(17), {"max_tokens": 1}),
    Request(tokens(70), {"max_tokens": 15}, joins_at=1),
    Request(tokens(32), {"max_tokens": 9, **few(0)}, joins_at=2),
    Request(tokens(5), {"max_tokens": 20, **few(1)}, joins_at=2),
    Request(tokens(1), {"max_tokens": 10}, joins_at=5),
    Request(tokens(8), {"max_tokens": 12, "structured_outputs": {"regex": "[a-d]{9}"}}),
)
ENGINE = {"max_num_seqs": 4, "max_num_batched_tokens": 32}


def assert_reused(runner, scenario, num_verifications):
    """Tokens are plain vLLM's, and drafts are accepted as without reuse; returns the report."""
    speculative = {**scenario.speculative, "reuse_exit_states": "off"}
    plain, usual = runner.serve(scenario.plain(), replace(scenario, speculative=speculative))
    reused, num_steps = runner.run(COUNT, scenario)
    assert num_steps >= num_verifications
    assert_same_outputs(plain, reused)
    assert reused.counts == usual.counts
    assert reused.num_preemptions == usual.num_preemptions
    return reused


@pytest.mark.gpu
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("exit_layer", "num_speculative_tokens"), [(2, 3), (4, 5), (NUM_LAYERS, 3)]
)
@pytest.mark.feature("Speculative settings", "`reuse_exit_states`")
def test_tokens_equal_plain_when_requests_join_and_leave(
    runner, checkpoint, exit_layer, num_speculative_tokens, is_async
):
    """With E = L a verification's outputs are nothing but exit states, and the norm."""
    speculative = layerskip(exit_layer, num_speculative_tokens, reuse_exit_states="on")
    scenario = Scenario(str(checkpoint()), REQUESTS, speculative, ENGINE, is_async)
    reused = assert_reused(runner, scenario, num_verifications=8)
    assert any(step.num_drafts and step.num_mid_prompt for step in reused.steps)
    if exit_layer < NUM_LAYERS:
        assert_some_accepted_some_refused(reused)


@pytest.mark.gpu
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_tokens_equal_plain_when_requests_are_preempted_and_resume(
    runner, checkpoint, enable_prefix_caching
):
    requests = tuple(Request(tokens(26, seed), {"max_tokens": 12}) for seed in range(3))
    engine = {
        "kv_cache_memory_bytes": 5 * BLOCK_BYTES,
        "max_model_len": 64,
        "enable_prefix_caching": enable_prefix_caching,
    }
    speculative = layerskip(2, 3, reuse_exit_states="on")
    scenario = Scenario(str(checkpoint()), requests, speculative, engine)
    assert assert_reused(runner, scenario, num_verifications=4).num_preemptions > 0


@pytest.mark.parametrize("architecture", ["llama-tied", "gemma2", "phi3", "qwen3-moe"])
def test_tokens_equal_plain_when_the_model_is(runner, checkpoint, architecture):
    """Of other layers, of two KV cache groups, of experts."""
    requests = tuple(
        Request(tokens(length), {"max_tokens": 14}, joins_at=order)
        for order, length in enumerate((40, 5, 20))
    )
    speculative = layerskip(4, 3, reuse_exit_states="on")
    scenario = Scenario(str(checkpoint(architecture)), requests, speculative)
    assert_reused(runner, scenario, num_verifications=4)


def test_states_are_not_used_when_weights_change_between_draft_and_verification(runner, checkpoint):
    requests = (Request(tokens(15), {"max_tokens": 16}), Request(tokens(40), {"max_tokens": 16}))
    other = str(checkpoint(seed=1))
    found = [
        runner.run(
            "tests.support.reuse_job:serve_with_reload_after_a_draft",
            Scenario(str(checkpoint()), requests, layerskip(4, 3, reuse_exit_states=reuse)),
            other,
        )
        for reuse in ("off", "on")
    ]
    assert found[0].token_ids == found[1].token_ids
    assert found[0].counts == found[1].counts


def test_states_are_used_in_large_steps_alone_when_reuse_is_auto(engines, checkpoint):
    speculative = layerskip(4, 3, reuse_exit_states="auto")
    for num_requests, is_reused in ((7, False), (8, True)):
        requests = tuple(Request(tokens(9, i), {"max_tokens": 12}) for i in range(num_requests))
        scenario = Scenario(str(checkpoint()), requests, speculative)
        report, num_steps = engines.run("v1", COUNT, scenario)
        assert report.num_drafts > 0
        assert (num_steps > 0) == is_reused
