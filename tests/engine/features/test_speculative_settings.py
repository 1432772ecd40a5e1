"""vLLM's own speculative settings: K by batch size, verification methods, per-request metrics."""

import pytest

from layerskip_vllm.tools.engine_process import JobError
from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import (
    assert_all_accepted,
    assert_same_outputs,
    assert_some_accepted_some_refused,
    completions,
)
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.gpu

REQUESTS = (
    Request(tokens(20), {"max_tokens": 14}),
    Request(tokens(5), {"max_tokens": 4}),
    Request(tokens(37), {"max_tokens": 6}, joins_at=1),
)


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS])
@pytest.mark.parametrize(
    ("schedule", "lengths"),
    [([[1, 1, 3], [2, 4, 1]], {1, 3}), ([[1, 2, 2], [3, 4, 0]], {2})],
    ids=["3-or-1", "2-or-none"],
)
@pytest.mark.feature("Speculative settings", "`num_speculative_tokens_per_batch_size`")
def test_tokens_equal_plain_when_draft_length_depends_on_batch_size(
    runner, checkpoint, schedule, lengths, exit_layer
):
    speculative = layerskip(exit_layer, 3, num_speculative_tokens_per_batch_size=schedule)
    scenario = Scenario(str(checkpoint()), REQUESTS, speculative, {"max_num_seqs": 4})
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert {length for step in drafted.steps for length in step.draft_lens} == lengths
    for step, after in zip(drafted.steps, drafted.steps[1:], strict=False):
        batch_size = min(step.num_requests, schedule[-1][1])
        expected = next(k for low, high, k in schedule if low <= batch_size <= high)
        assert set(after.draft_lens) <= {expected}
    if exit_layer == NUM_LAYERS:
        assert_all_accepted(drafted)


@pytest.mark.parametrize(
    "settings",
    [
        {"rejection_sample_method": "block"},
        {"draft_sample_method": "probabilistic"},
        {"rejection_sample_method": "block", "draft_sample_method": "probabilistic"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_greedy_tokens_equal_plain_when_sampling_setting_is(runner, checkpoint, settings):
    scenario = Scenario(str(checkpoint()), REQUESTS, layerskip(4, 3, **settings))
    if runner.name == "v1" and settings.get("rejection_sample_method") == "block":
        with pytest.raises(JobError, match="'block', but Model Runner V1 has no block verific"):
            runner.engines.serve("v1", scenario)
        return
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert_some_accepted_some_refused(drafted)


@pytest.mark.feature(
    "Speculative settings", "`rejection_sample_method`: synthetic", runners=("v2",)
)
def test_acceptance_is_as_given_when_it_is_synthetic(runner, checkpoint):
    rates = {
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": [1.0, 1.0, 0.0],
    }
    scenario = Scenario(str(checkpoint()), REQUESTS, layerskip(2, 3, **rates))
    if runner.name == "v1":
        with pytest.raises(JobError, match="'synthetic', but vLLM has no synthetic acceptance on"):
            runner.engines.serve("v1", scenario)
        return
    (drafted,) = runner.serve(scenario)
    assert drafted.num_drafts > 3
    assert drafted.num_accepted_per_pos == (drafted.num_drafts, drafted.num_drafts, 0)


@pytest.mark.feature("Speculative settings", "per-request metrics")
def test_metrics_of_requests_add_up_when_they_are_detailed(runner, checkpoint):
    scenario = Scenario(
        str(checkpoint()),
        REQUESTS,
        layerskip(4, 3),
        {"per_request_spec_decode_metrics": "detailed"},
    )
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    metrics = [completion.spec_decode for completion in completions(drafted)]
    assert sum(m["num_draft_tokens"] for m in metrics) == drafted.num_draft_tokens
    assert sum(sum(m["per_step_accepted"]) for m in metrics) == drafted.num_accepted
    assert sum(len(m["per_step_accepted"]) for m in metrics) == drafted.num_drafts
    assert any(len(set(m["per_step_accepted"])) > 1 for m in metrics)
