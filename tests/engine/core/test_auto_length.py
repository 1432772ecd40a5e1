"""K "auto": tokens are plain vLLM's whatever each step drafts, and what pays is learned."""

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import assert_same_outputs, assert_some_accepted_some_refused
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.gpu

K = 4
LENGTHS = (0, 3, 1, K, 0, 0, 2)
DETAILED = {"per_request_spec_decode_metrics": "detailed"}


def limit(num_drafts):
    return {"extra_args": {"layerskip": {"num_speculative_tokens": num_drafts}}}


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS], ids=["E=2", "all-accepted"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.feature("Requests", '`num_speculative_tokens: "auto"`')
def test_tokens_are_plains_when_each_step_drafts_another_number(
    runner, checkpoint, is_async, exit_layer
):
    """One is long in its prompt, two join late, one is cached, and one drafts two at most."""
    requests = (
        Request(tokens(9, 0), {"max_tokens": 40}),
        Request(tokens(70, 1), {"max_tokens": 12}),
        Request(tokens(7, 2), {"max_tokens": 30, **limit(2)}, joins_at=2),
        Request(tokens(9, 0), {"max_tokens": 25, "seed": 1}, joins_at=9),
    )
    engine = {"max_num_batched_tokens": 32, "enable_prefix_caching": True, **DETAILED}
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(exit_layer, f"auto:{K}"),
        engine,
        is_async=is_async,
        lengths=LENGTHS,
    )
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert {step.num_to_draft for step in drafted.steps} == set(LENGTHS)
    for step, after in zip(drafted.steps, drafted.steps[1:], strict=False):
        assert max(after.draft_lens, default=0) <= step.num_to_draft
    assert {len(set(step.draft_lens)) for step in drafted.steps} >= {0, 1, 2}
    if exit_layer == 2:
        assert_some_accepted_some_refused(drafted)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_engine_measures_itself_before_it_drafts(runner, checkpoint, is_async):
    """Steps without drafts come first, until two are timed; bytes then speak for drafts."""
    requests = tuple(Request(tokens(9, seed), {"max_tokens": 40}) for seed in range(2))
    scenario = Scenario(
        str(checkpoint()), requests, layerskip(1, f"auto:{K}"), DETAILED, is_async=is_async
    )
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    chosen = [step.num_to_draft for step in drafted.steps]
    first = next(i for i, num_to_draft in enumerate(chosen) if num_to_draft)
    # The prompts' step, one after it that none of its kind came before, and two to be timed.
    assert 4 <= first <= 8
    assert drafted.num_drafts > 0


def test_tokens_are_plains_when_exit_states_are_reused(runner, checkpoint):
    """A verification begins at the exit, of as many drafts as the step before has made."""
    requests = tuple(
        Request(tokens(9 + seed, seed), {"max_tokens": 25}, joins_at=2 * seed) for seed in range(3)
    )
    speculative = layerskip(2, f"auto:{K}", reuse_exit_states="on")
    scenario = Scenario(str(checkpoint()), requests, speculative, lengths=LENGTHS)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert {step.num_to_draft for step in drafted.steps} == set(LENGTHS)
    assert_some_accepted_some_refused(drafted)
