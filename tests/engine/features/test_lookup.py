"""Drafts that are copied where a request's text repeats itself: its own, and accepted as such."""

from dataclasses import replace

import pytest

from layerskip_vllm.drafting.lookup import MAX_MATCH, MIN_MATCH
from tests.support.checkpoints import NUM_LAYERS, VOCAB_SIZE
from tests.support.checks import assert_same_outputs, completions
from tests.support.draft_vocabs import make_draft_vocab
from tests.support.lookups import K, copying, repeating, without_lookup
from tests.support.scenarios import Request, tokens

pytestmark = pytest.mark.gpu

SEE_DRAFT_STEPS = "tests.support.rows_job:serve_and_see_draft_steps"
K_BY_BATCH_SIZE = [[1, 1, 3], [2, 2, 0], [3, 3, 1]]
BLOCK_BYTES = 1 << 17  # of the tiny Llama: 32 tokens, 8 layers, 2 heads of 32, keys and values


@pytest.mark.feature("Speculative settings", "`lookup`")
def test_copies_are_accepted_when_text_repeats(runner, checkpoint):
    scenario = copying(checkpoint(), repeating(20, [7]))
    plain, copied = runner.pair(scenario)
    (drafted,) = runner.serve(without_lookup(scenario))
    assert_same_outputs(plain, copied)
    assert drafted.acceptance < 0.1
    assert copied.acceptance > 0.6
    assert len(copied.steps) < 0.5 * len(drafted.steps)


def test_nothing_changes_when_text_does_not_repeat(runner, checkpoint):
    scenario = copying(checkpoint(), Request(tokens(20), {"max_tokens": 24}))
    copied, drafted = runner.serve(scenario, without_lookup(scenario))
    assert copied.token_ids == drafted.token_ids
    assert copied.counts == drafted.counts


def test_tokens_equal_plain_when_some_repeat_and_some_do_not(runner, checkpoint):
    """Also with fewer drafts, or none, and in rows that others have left."""
    scenario = copying(
        checkpoint(),
        repeating(20, [7]),
        Request(tokens(7), {"max_tokens": 24}, joins_at=1),
        repeating(41, [9, 12], 40, joins_at=2),
        repeating(9, [30, 31, 32], joins_at=6),
        repeating(9, [7], params=drafting_at_most(2), joins_at=7),
        repeating(9, [8], params=drafting_at_most(0), joins_at=8),
        Request(tokens(33), {"max_tokens": 16}, joins_at=9),
    )
    plain, copied = runner.pair(scenario)
    (drafted,) = runner.serve(without_lookup(scenario))
    assert_same_outputs(plain, copied)
    assert copied.num_accepted > drafted.num_accepted + 30


def drafting_at_most(num_tokens):
    return {"extra_args": {"layerskip": {"num_speculative_tokens": num_tokens}}}


def test_draft_steps_are_not_run_when_all_requests_have_copies(runner, checkpoint):
    """They are until enough tokens agree; on V2, where the host goes by the step before, longer."""
    requests = (repeating(20, [7], 50), repeating(11, [8], 50))
    copied, draft_steps = runner.run(SEE_DRAFT_STEPS, copying(checkpoint(), *requests))
    num_verifications = len(copied.steps) - 1
    assert num_verifications < 30
    num_drafted = MIN_MATCH if runner.name == "v1" else MAX_MATCH + 1
    # Warm-ups run draft steps on V2 too, but before the count begins.
    assert K * (MIN_MATCH - 1) <= len(draft_steps) <= K * num_drafted < K * num_verifications


def test_copies_are_of_the_own_text_when_a_row_was_anothers(runner, checkpoint):
    """A text of the same token as the one before it would be copied from that from the start."""
    alone = copying(checkpoint(), repeating(20, [7]))
    in_turn = copying(checkpoint(), *(repeating(20, [7], phase=phase) for phase in range(3)))
    one, three = runner.serve(alone, in_turn)
    assert three.num_accepted == 3 * one.num_accepted
    assert three.num_drafts == 3 * one.num_drafts


def test_tokens_equal_plain_when_repeating_requests_are_preempted(runner, checkpoint):
    requests = tuple(repeating(26, [7 + seed], 20) for seed in range(3))
    scenario = copying(
        checkpoint(), *requests, kv_cache_memory_bytes=5 * BLOCK_BYTES, max_model_len=64
    )
    plain, copied = runner.pair(scenario)
    assert copied.num_preemptions > 0
    assert_same_outputs(plain, copied)
    assert copied.acceptance > 0.4


def test_seed_gives_the_same_tokens_when_neighbours_differ(runner, checkpoint):
    """One whose copies end with a batch that runs no draft steps, and with one that does."""
    params = {"temperature": 0.6, "seed": 5}
    request = repeating(20, [9, 12], 60, params=params)
    other = Request(tokens(7), {"max_tokens": 40})
    alone, beside = runner.serve(
        copying(checkpoint(), request), copying(checkpoint(), request, other)
    )
    assert len(set(alone.token_ids[0][0])) == 2
    assert beside.token_ids[0] == alone.token_ids[0]


def test_seed_gives_the_same_tokens_when_the_row_was_a_repeating_requests(runner, checkpoint):
    """Not without a draft after its prompt, as where its own text had repeated itself."""
    sampled = Request(tokens(7), {"temperature": 0.01, "seed": 5, "max_tokens": 8})
    in_turn = copying(
        checkpoint(),
        repeating(20, [7]),
        replace(sampled, phase=1),
        settings={"exit_layer": NUM_LAYERS},
        per_request_spec_decode_metrics="detailed",
    )
    (after,) = runner.serve(in_turn)
    alone = runner.run("tests.support.jobs:serve_alone", replace(in_turn, requests=(sampled,)))
    assert alone.acceptance > 0.8  # what has no draft shows
    assert after.token_ids[1] == alone.token_ids[0]
    assert completions(after)[1].spec_decode == completions(alone)[0].spec_decode


def test_tokens_equal_plain_when_k_changes_from_step_to_step(runner, checkpoint, tmp_path):
    """Also with drafts of few tokens, from which copies are free."""
    settings = {
        "num_speculative_tokens_per_batch_size": K_BY_BATCH_SIZE,
        "draft_vocab": make_draft_vocab(tmp_path / "ids.json", range(0, VOCAB_SIZE, 8)),
    }
    scenario = copying(
        checkpoint(),
        repeating(20, [7], 60),
        repeating(11, [9, 12], 20, joins_at=5),
        Request(tokens(7), {"max_tokens": 8}, joins_at=8),
        repeating(9, [8], 30, phase=1),
        repeating(13, [30, 31, 32], 12, joins_at=9, phase=1),
        repeating(9, [7], 12, joins_at=11, phase=1),
        settings=settings,
    )
    plain, copied = runner.pair(scenario)
    assert_same_outputs(plain, copied)
    assert {step.num_to_draft for step in copied.steps} == {0, 1, 3}
    for step, after in zip(copied.steps, copied.steps[1:], strict=False):
        assert max(after.draft_lens, default=0) <= step.num_to_draft
    assert copied.acceptance > 0.4


def test_draft_steps_are_run_when_the_row_was_a_repeating_requests(runner, checkpoint):
    """A request whose prompt ends in a step with K = 0, which finds no copies."""
    copied, draft_steps = runner.run(
        SEE_DRAFT_STEPS,
        copying(
            checkpoint(),
            repeating(20, [7]),
            Request(tokens(7), {"max_tokens": 12}, phase=1),
            Request(tokens(9), {"max_tokens": 3}, phase=1),
            settings={"num_speculative_tokens_per_batch_size": K_BY_BATCH_SIZE},
        ),
    )
    sizes = [step.num_requests for step in copied.steps]
    last_of_two = len(sizes) - 1 - sizes[::-1].index(2)
    assert copied.steps[last_of_two].num_to_draft == 0
    assert draft_steps.count(last_of_two + 1) == K


def test_no_draft_is_lost_when_ranks_draft_alike(runner, checkpoint):
    """Nor does a step without requests, by which an idle rank keeps step, change what is known."""
    if runner.name == "v1":
        pytest.skip("V1 loses none: it looks for copies before it leaves draft steps out")
    job = "tests.support.rows_job:serve_and_count_lost_drafts"
    params = {"temperature": 0.6, "seed": 5}
    scenario = copying(checkpoint(), repeating(20, [9, 12], 60, params=params))
    lost_of_one, _ = runner.run(job, scenario, 1)
    lost_of_two, is_repeating = runner.run(job, scenario, 2)
    assert lost_of_one > lost_of_two == 0
    assert is_repeating == [True] * 3
