"""How many tokens each request of a batch drafts: `extra_args={"layerskip": {...}}`."""

import pytest

from layerskip_vllm.tools.engine_process import JobError
from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import (
    assert_close_logprobs,
    assert_same_outputs,
    assert_some_accepted_some_refused,
    completions,
)
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.gpu

K = 4
DETAILED = {"per_request_spec_decode_metrics": "detailed"}


def limit(num_drafts):
    """The argument of a request; none if it leaves the number to the engine."""
    if num_drafts is None:
        return {}
    return {"extra_args": {"layerskip": {"num_speculative_tokens": num_drafts}}}


def steps_of(report, index):
    """How many drafts a request had verified in each step that verified some."""
    (completion,) = report.outputs[index].completions
    return completion.spec_decode.get("per_step_drafted", [])


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS], ids=["E=2", "all-accepted"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.feature("Requests", "a draft length of the request's own")
def test_each_request_drafts_its_number_when_they_share_a_batch(
    runner, checkpoint, is_async, exit_layer
):
    """One is still in its prompt while others decode, and one joins late."""
    limits = (None, 0, 1, 2, K)
    requests = (
        Request(tokens(9, 0), {"max_tokens": 16}),
        Request(tokens(12, 1), {"max_tokens": 11, **limit(0)}),
        Request(tokens(40, 2), {"max_tokens": 13, **limit(1)}),
        Request(tokens(7, 3), {"max_tokens": 13, **limit(2)}, joins_at=1),
        Request(tokens(20, 4), {"max_tokens": 11, **limit(K)}, joins_at=3),
    )
    engine = {"max_num_batched_tokens": 32, **DETAILED}
    scenario = Scenario(
        str(checkpoint()), requests, layerskip(exit_layer, K), engine, is_async=is_async
    )
    plain, drafted = runner.pair(scenario)
    assert drafted.is_async == is_async
    assert_same_outputs(plain, drafted)
    for index, num_drafts in enumerate(limits):
        drafted_lens = steps_of(drafted, index)
        longest = K if num_drafts is None else num_drafts
        assert max(drafted_lens, default=0) == longest
        if exit_layer == NUM_LAYERS and longest > 0:
            # Nothing is refused, so that each step but the last takes its full number.
            assert set(drafted_lens[:-1]) == {longest}
    assert any(len(set(step.draft_lens)) > 2 for step in drafted.steps)
    if exit_layer == 2:
        assert_some_accepted_some_refused(drafted)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_no_draft_step_is_run_when_no_request_drafts(runner, checkpoint, is_async):
    """Drafting stops with the last request that drafts, and starts again with the next."""
    requests = (
        Request(tokens(9, 0), {"max_tokens": 14, **limit(0)}),
        Request(tokens(12, 1), {"max_tokens": 6, **limit(2)}, joins_at=3),
        Request(tokens(20, 2), {"max_tokens": 10, **limit(0)}, joins_at=4),
        Request(tokens(5, 3), {"max_tokens": 9}, phase=1),
    )
    scenario = Scenario(str(checkpoint()), requests, layerskip(4, K), DETAILED, is_async=is_async)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert [max(steps_of(drafted, index), default=0) for index in range(4)] == [0, 2, 0, K]
    to_draft = [step.num_to_draft for step in drafted.steps if step.num_requests]
    assert set(to_draft) == {0, 2, K}
    assert to_draft[:3] == [0, 0, 0]
    for step, after in zip(drafted.steps, drafted.steps[1:], strict=False):
        assert max(after.draft_lens, default=0) <= step.num_to_draft


def test_samples_equal_plain_when_no_request_drafts(runner, checkpoint):
    """Each step is sampled as without speculation, one request beside another and alone."""
    sampled = {"temperature": 1.0, "max_tokens": 14, **limit(0)}
    requests = (
        Request(tokens(9), {**sampled, "seed": 1, "top_k": 10, "logprobs": 2}),
        Request(tokens(12), {**sampled, "seed": 2, "top_p": 0.9, "presence_penalty": 1.0}),
        Request(tokens(20), {**sampled, "seed": 3, "top_k": 5}, phase=1),
    )
    scenario = Scenario(str(checkpoint()), requests, layerskip(2, K))
    plain, drafted = runner.pair(scenario)
    assert drafted.num_drafts == 0
    assert drafted.token_ids == plain.token_ids
    assert_close_logprobs(completions(plain)[0], completions(drafted)[0])


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_v1_prepares_no_drafts_when_no_request_drafts(engines, checkpoint, is_async):
    """Where steps are scheduled ahead, the next one needs what is found out for drafts."""
    requests = (
        Request(tokens(9), {"max_tokens": 9, **limit(0)}),
        Request(tokens(12), {"max_tokens": 9}, phase=1),
    )
    scenario = Scenario(str(checkpoint()), requests, layerskip(2, K), is_async=is_async)
    report, prepared = engines.run(
        "v1", "tests.support.rows_job:serve_and_see_preparations", scenario
    )
    drafting = {i for i, step in enumerate(report.steps) if step.num_to_draft}
    assert 0 < len(drafting) < len(report.steps) - 5
    assert drafting <= set(prepared)
    assert (set(prepared) == drafting) == (not is_async)


def test_requests_leave_the_budget_to_others_when_they_draft_less(runner, checkpoint):
    """Eight tokens a step are two requests without drafts and one with K = 5, all at once."""
    params = ({"max_tokens": 20, **limit(0)}, {"max_tokens": 20, **limit(0)}, {"max_tokens": 20})
    requests = tuple(Request(tokens(2, seed), p) for seed, p in enumerate(params))
    engine = {"max_num_batched_tokens": 8, "max_num_seqs": 4, **DETAILED}
    scenario = Scenario(str(checkpoint()), requests, layerskip(4, 5), engine)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert [step.num_requests for step in drafted.steps[:5]] == [3] * 5
    assert [step.draft_lens for step in drafted.steps[:4]] == [(), (5,), (5,), (5,)]
    assert max(steps_of(drafted, 2)) == 5


def test_requests_draft_their_number_when_k_depends_on_batch_size(runner, checkpoint):
    requests = (
        Request(tokens(20), {"max_tokens": 20, **limit(2)}),
        Request(tokens(5), {"max_tokens": 6}),
        Request(tokens(37), {"max_tokens": 4, **limit(0)}, joins_at=1),
    )
    schedule = [[1, 1, 3], [2, 4, 1]]
    speculative = layerskip(4, 3, num_speculative_tokens_per_batch_size=schedule)
    scenario = Scenario(str(checkpoint()), requests, speculative, {"max_num_seqs": 4, **DETAILED})
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert set(steps_of(drafted, 0)) == {1, 2}
    assert set(steps_of(drafted, 1)) == {1}
    assert steps_of(drafted, 2) == []


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_requests_draft_their_number_when_their_prompt_is_cached(runner, checkpoint, is_async):
    """Cached but for one token, to which vLLM would add K placeholders, whatever they ask for."""
    prompt = tokens(33)
    others = tuple(
        Request(prompt, {"max_tokens": 9, **limit(num_drafts)}, phase=1 + order)
        for order, num_drafts in enumerate((None, 0, 1))
    )
    requests = (Request(prompt, {"max_tokens": 3}), *others)
    scenario = Scenario(
        str(checkpoint()),
        requests,
        layerskip(4, K),
        {"enable_prefix_caching": True, **DETAILED},
        is_async=is_async,
    )
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert not any(step.num_padded for step in drafted.steps)
    assert [steps_of(drafted, index)[:1] for index in (1, 2, 3)] == [[K], [], [1]]
    assert max(steps_of(drafted, 3)) == 1


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_requests_draft_their_number_when_they_are_sampled(runner, checkpoint, method):
    """Drafts' probabilities go with the drafts that are left, and greedy requests stay greedy."""
    sampled = {"temperature": 1.0, "max_tokens": 12}
    requests = (
        Request(tokens(9, 0), {**sampled, **limit(0)}),
        Request(tokens(12, 1), {"max_tokens": 12, **limit(1)}),
        Request(tokens(11, 2), {**sampled, **limit(2)}),
        Request(tokens(8, 3), {"max_tokens": 12}),
        Request(tokens(8, 4), sampled),
    )
    speculative = layerskip(4, K, draft_sample_method=method)
    scenario = Scenario(str(checkpoint()), requests, speculative, DETAILED)
    plain, drafted = runner.pair(scenario)
    assert [drafted.token_ids[i] for i in (1, 3)] == [plain.token_ids[i] for i in (1, 3)]
    assert [max(steps_of(drafted, i), default=0) for i in range(5)] == [0, 1, 2, K, K]
    assert_some_accepted_some_refused(drafted)


def test_request_drafts_the_engines_number_when_no_check_has_seen_its_entry(runner, checkpoint):
    """As of a client that adds requests to the engine core itself."""
    field = "num_speculative_tokens"
    entries = (
        *("off", -1, 2.5, 10**9, None, True, b"2", [2], [[[]]], {}, {3: 2}),
        *({field: value} for value in ("2", -1, 2.5, 10**9, None, True, [2], {field: 2})),
        *(f'{{"{field}": {value}}}' for value in ("1e3", "[2]", "null", "-1", '"2"')),
        *("[" * 5000, "1" * 5000),
    )
    requests = (
        *(
            Request(tokens(5 + index), unchecked={"layerskip": entry}, joins_at=index // 4)
            for index, entry in enumerate(entries)
        ),
        Request(tokens(9), limit(2)),
        Request(tokens(8), unchecked={"layerskip": {field: 2}}),
    )
    scenario = Scenario(str(checkpoint()), requests, layerskip(4, 3), DETAILED)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    found = [max(steps_of(drafted, index)) for index in range(len(requests))]
    assert found == [3] * len(entries) + [2, 2]


@pytest.mark.parametrize("speculative", [None, layerskip(2, 3)], ids=["plain", "layerskip"])
def test_request_is_refused_when_its_number_is_out_of_reach(engines, checkpoint, speculative):
    scenario = Scenario(str(checkpoint()), (Request(tokens(5), limit(4)),), speculative)
    expected = (
        "this engine does not draft with layerskip; leave it out"
        if speculative is None
        else r"\['num_speculative_tokens'\] is 4; it must be an integer from 0, .* to 3"
    )
    with pytest.raises(JobError, match=rf"RequestError: extra_args\['layerskip'\].*{expected}"):
        engines.serve("v1", scenario)
