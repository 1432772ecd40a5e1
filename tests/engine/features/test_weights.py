"""Drafts follow the target's weights at once when these change while the engine runs."""

import pytest
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import assert_all_accepted
from tests.support.scenarios import Request, Scenario, layerskip, tokens


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


RELOAD = "tests.support.weights_job:serve_with_reload"
EXIT_LAYER = 4


def requests_before_and_after():
    lengths = (9, 15, 23)
    return tuple(
        Request(tokens(n), {"max_tokens": 24}, phase=phase) for phase in (0, 1) for n in lengths
    )


def accepted(report, earlier):
    """The share of draft tokens that were accepted since an earlier report."""
    return (report.num_accepted - earlier.num_accepted) / (
        report.num_draft_tokens - earlier.num_draft_tokens
    )


@pytest.mark.feature("Models and weights", "weights reloaded or updated in place")
def test_engine_is_as_a_fresh_one_when_another_checkpoint_was_loaded_in_place(runner, checkpoint):
    old, new = checkpoint(), str(checkpoint(seed=1))
    requests = requests_before_and_after()
    scenario = Scenario(str(old), requests, layerskip(EXIT_LAYER, 3))
    before, reloaded = runner.run(RELOAD, scenario, new)

    second_phase = tuple(Request(r.prompt, r.params) for r in requests if r.phase == 1)
    (fresh,) = runner.serve(Scenario(new, second_phase, scenario.speculative))
    assert reloaded.token_ids[len(second_phase) :] == fresh.token_ids
    assert before.token_ids[: len(second_phase)] != fresh.token_ids
    assert reloaded.num_draft_tokens - before.num_draft_tokens == fresh.num_draft_tokens
    assert reloaded.num_accepted - before.num_accepted == fresh.num_accepted


def test_a_separate_draft_goes_stale_when_another_checkpoint_was_loaded_in_place(
    engines, checkpoint, tmp_path
):
    """The same layers as a draft model of their own: what drafting with the target's avoids."""
    old, new = checkpoint(), str(checkpoint(seed=1))
    draft = AutoModelForCausalLM.from_pretrained(old, num_hidden_layers=EXIT_LAYER)
    draft.save_pretrained(tmp_path)
    separate = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    acceptances = {}
    for name, speculative in (("layerskip", layerskip(EXIT_LAYER, 3)), ("draft_model", separate)):
        scenario = Scenario(str(old), requests_before_and_after(), speculative)
        before, after = engines.run("v1", RELOAD, scenario, new)
        acceptances[name] = (before.acceptance, accepted(after, before))
    assert acceptances["draft_model"][0] == acceptances["layerskip"][0]
    assert acceptances["draft_model"][1] < 0.1 < acceptances["layerskip"][1]
