"""Prefix caching: cached blocks are never spoiled by drafts, and cached prompts draft rightly."""

from dataclasses import replace

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import (
    assert_all_accepted,
    assert_close_logprobs,
    assert_same_outputs,
    completions,
)
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 32
CACHING = {"enable_prefix_caching": True}


def pair(runner, scenario):
    """With a cache and drafts, against plain vLLM without a cache."""
    plain = replace(scenario.plain(), engine={**scenario.engine, "enable_prefix_caching": False})
    return runner.serve(plain, scenario)


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS])
@pytest.mark.feature("KV cache", "prefix caching")
def test_tokens_equal_plain_when_prompts_repeat(runner, checkpoint, exit_layer):
    """Shared beginnings of one and two blocks, and whole prompts, in the same batch and later."""
    base = tokens(80)
    prompts = (base, base[:40] + tokens(30, 1), base[:70] + tokens(5, 2), tokens(20, 3))
    requests = tuple(
        Request(prompt, {"max_tokens": 7 + phase}, joins_at=index, phase=phase)
        for phase in (0, 1)
        for index, prompt in enumerate(prompts)
    )
    scenario = Scenario(str(checkpoint()), requests, layerskip(exit_layer, 3), CACHING)
    plain, drafted = pair(runner, scenario)
    assert_same_outputs(plain, drafted)
    assert [o.num_cached_tokens for o in drafted.outputs[4:]] == [64, 64, 64, 0]
    if exit_layer == NUM_LAYERS:
        assert_all_accepted(drafted)


@pytest.mark.parametrize(("exit_layer", "num_speculative_tokens"), [(2, 3), (4, 5)])
def test_tokens_equal_plain_when_prompt_is_cached_but_for_one_token(
    runner, checkpoint, exit_layer, num_speculative_tokens
):
    """Such a prompt, and one of one token, looks like a decode when it joins: vLLM would have it
    verify K placeholders, which nothing has drafted."""
    prompt, other = tokens(2 * BLOCK_SIZE + 1), tokens(10, 1)
    requests = (
        Request(prompt, {"max_tokens": 6}),
        Request(other, {"max_tokens": 14}, phase=1),
        Request(prompt, {"max_tokens": 8}, joins_at=2, phase=1),
        Request(prompt, {"max_tokens": 1}, joins_at=2, phase=1),
        Request(prompt[:1], {"max_tokens": 6}, joins_at=3, phase=1),
        Request(prompt, {"max_tokens": 6, "min_tokens": 5, "logprobs": 2}, joins_at=4, phase=1),
    )
    speculative = layerskip(exit_layer, num_speculative_tokens)
    plain, drafted = pair(runner, Scenario(str(checkpoint()), requests, speculative, CACHING))
    assert_same_outputs(plain, drafted)
    assert_close_logprobs(completions(plain)[-1], completions(drafted)[-1])
    assert [o.num_cached_tokens for o in drafted.outputs] == [0, 0, 64, 64, 0, 64]
    assert not any(step.num_padded for step in drafted.steps)


@pytest.mark.parametrize("exit_layer", [2, 4])
def test_tokens_equal_plain_when_a_prompt_is_the_text_of_another(runner, checkpoint, exit_layer):
    """First A is generated up to `max_model_len`, then prompts that are A's text up to some point.

    What was drafted and refused while A was generated lay in the blocks that are now read.
    """
    engine = {"max_model_len": 3 * BLOCK_SIZE}
    first = Request(tokens(60), {"max_tokens": 99})
    (plain,) = runner.serve(Scenario(str(checkpoint()), (first,), None, engine))
    text = first.prompt + plain.outputs[0].token_ids
    assert len(text) == 3 * BLOCK_SIZE
    requests = (
        first,
        *(
            Request(text[:length], {"max_tokens": 99}, phase=1 + phase)
            for phase, length in enumerate((95, 90, 65, 64, 63))
        ),
        Request(text[:70] + tokens(10, 1), {"max_tokens": 4}, phase=6),
    )
    scenario = Scenario(str(checkpoint()), requests, layerskip(exit_layer, 5), engine | CACHING)
    plain, drafted = pair(runner, scenario)
    assert_same_outputs(plain, drafted)
    assert [o.num_cached_tokens for o in drafted.outputs] == [0, 64, 64, 64, 32, 32, 64]
    for request, output in zip(requests[1:6], drafted.outputs[1:6], strict=True):
        assert request.prompt + output.token_ids == text


def test_tokens_equal_plain_when_cached_blocks_are_drafted_over_by_others(runner, checkpoint):
    """Two requests go on from the same cached blocks at once, one of them refused more often."""
    prompt = tokens(BLOCK_SIZE + 5)
    requests = (
        Request(prompt, {"max_tokens": 2}),
        Request(prompt, {"max_tokens": 12}, phase=1),
        Request(prompt[:BLOCK_SIZE] + tokens(4, 1), {"max_tokens": 12}, phase=1),
        Request(prompt, {"max_tokens": 12}, phase=2),
    )
    scenario = Scenario(str(checkpoint()), requests, layerskip(2, 5), CACHING)
    plain, drafted = pair(runner, scenario)
    assert_same_outputs(plain, drafted)
    assert [o.num_cached_tokens for o in drafted.outputs] == [0, 32, 32, 32]
