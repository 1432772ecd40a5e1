"""Sampled tokens keep the target's distribution, whatever the drafts are.

The prompt is sampled from many times, with plain vLLM twice and with drafts, and two samples are
compared by a chi-square test on pairs of neighbouring tokens (`verify.statistics`).
"""

from dataclasses import replace

import pytest

from layerskip_vllm.tools.verify.statistics import compare_samples
from tests.support.checks import assert_some_accepted_some_refused
from tests.support.draft_vocabs import make_draft_vocab
from tests.support.engine_process import IS_ON_GPU, TESTED_RUNNERS
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.gpu

# The probability that one comparison calls two samples of one distribution different.
FALSE_ALARM = 1e-6
VOCAB_SIZE = 24
# One token more than a block of the KV cache: once cached, it looks like a decode to the scheduler.
PROMPT = tokens(33, vocab_size=VOCAB_SIZE)
# Off a GPU, Model Runner V2 runs under Triton's interpreter, where a sample takes long.
SAMPLE_SIZE = {"v1": 2000, "v2": 2000 if IS_ON_GPU else 120}
# The first is the prompt's, then come two drafts and the token after them, then a second draft.
K = 2
MAX_TOKENS = 5
# Twice the logits of other tests: two thirds of this exit's probability lie on other tokens than
# the last layer's (total variation 0.69), so that a small sample shows drafts gone wrong.
LOGIT_SCALE = 2.0
EXIT_LAYER = 1


@pytest.fixture(params=TESTED_RUNNERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def scenario(checkpoint, name) -> Scenario:
    params = {"temperature": 1.0, "max_tokens": MAX_TOKENS}
    return Scenario(
        str(checkpoint(vocab_size=VOCAB_SIZE, logit_scale=LOGIT_SCALE)),
        (Request(PROMPT, params),) * SAMPLE_SIZE[name],
        None,
        {"max_num_seqs": 64, "seed": 1},
    )


def sample(report):
    return [token_ids for (token_ids,) in report.token_ids]


def plain_samples(engines, name, scenario):
    engine = scenario.engine | {"seed": 2}
    return map(sample, engines.serve(name, scenario, replace(scenario, engine=engine)))


@pytest.mark.parametrize("is_cached", [False, True], ids=["", "cached"])
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.feature("Requests", "sampling: the target's distribution")
def test_distribution_is_the_targets_when_drafts_are(engines, name, scenario, method, is_cached):
    """Neither plain samples differ, nor drafted ones from both plain ones together.

    False alarms: each of the two comparisons raises one with probability 1e-6, so the test fails
    by chance once in 500,000 runs.
    """
    one, other = plain_samples(engines, name, scenario)
    assert compare_samples(one, other).p_value > FALSE_ALARM
    engine = scenario.engine | {"seed": 3, "enable_prefix_caching": is_cached}
    speculative = layerskip(EXIT_LAYER, K, draft_sample_method=method)
    drafting = replace(scenario, engine=engine, speculative=speculative)
    (drafted,) = engines.serve(name, drafting)
    assert_some_accepted_some_refused(drafted)
    if is_cached:
        cached = [output.num_cached_tokens for output in drafted.outputs]
        assert cached.count(len(PROMPT) - 1) > SAMPLE_SIZE[name] / 2
    result = compare_samples(sample(drafted), [*one, *other])
    assert result.p_value > FALSE_ALARM, result


def test_distribution_is_the_targets_when_logits_are_cut_and_biased(engines, name, scenario):
    """`min_p` comes after temperature and biases, before `top_p`. Fails once in 500,000 runs."""
    settings = {"temperature": 0.7, "min_p": 0.1, "top_p": 0.8, "logit_bias": {5: 1.0, 9: -2.0}}
    (request, *_) = scenario.requests
    request = replace(request, params={**request.params, **settings})
    scenario = replace(scenario, requests=(request,) * SAMPLE_SIZE[name])
    one, other = plain_samples(engines, name, scenario)
    assert compare_samples(one, other).p_value > FALSE_ALARM
    engine = scenario.engine | {"seed": 3}
    drafting = replace(scenario, engine=engine, speculative=layerskip(EXIT_LAYER, K))
    (drafted,) = engines.serve(name, drafting)
    assert_some_accepted_some_refused(drafted)
    result = compare_samples(sample(drafted), [*one, *other])
    assert result.p_value > FALSE_ALARM, result


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_distribution_is_the_targets_when_drafts_choose_among_some_tokens(
    engines, name, scenario, method, tmp_path
):
    """One token of three. Fails by chance once in a million runs."""
    one, other = plain_samples(engines, name, scenario)
    file = make_draft_vocab(tmp_path / "ids.json", range(0, VOCAB_SIZE, 3), VOCAB_SIZE)
    speculative = layerskip(EXIT_LAYER, K, draft_sample_method=method, draft_vocab=file)
    engine = scenario.engine | {"seed": 3}
    (drafted,) = engines.serve(name, replace(scenario, engine=engine, speculative=speculative))
    assert_some_accepted_some_refused(drafted)
    assert compare_samples(sample(drafted), [*one, *other]).p_value > FALSE_ALARM


@pytest.mark.parametrize("name", ["v2"])
@pytest.mark.feature("Speculative settings", "`rejection_sample_method`: block")
def test_distribution_is_the_targets_when_verification_is_by_block(engines, scenario, name):
    """Only V2 has block verification. Fails by chance once in a million runs."""
    one, other = plain_samples(engines, "v2", scenario)
    speculative = layerskip(
        EXIT_LAYER, K, draft_sample_method="probabilistic", rejection_sample_method="block"
    )
    engine = scenario.engine | {"seed": 3}
    (drafted,) = engines.serve("v2", replace(scenario, engine=engine, speculative=speculative))
    assert_some_accepted_some_refused(drafted)
    assert compare_samples(sample(drafted), [*one, *other]).p_value > FALSE_ALARM


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_comparison_fails_when_drafts_are_accepted_unconditionally(engines, name, scenario, method):
    """The comparisons above can fail: here every draft is accepted, and they do."""
    one, other = plain_samples(engines, name, scenario)
    scenario = replace(scenario, engine=scenario.engine | {"seed": 3})
    speculative = layerskip(EXIT_LAYER, K, draft_sample_method=method)
    if name == "v1":  # has no such verification on the CPU
        job = "tests.support.unverified_job:serve_unverified"
        drafted = engines.run(name, job, replace(scenario, speculative=speculative))
    else:
        speculative |= {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [1.0] * K,
        }
        (drafted,) = engines.serve(name, replace(scenario, speculative=speculative))
    assert drafted.num_accepted == drafted.num_draft_tokens
    result = compare_samples(sample(drafted), [*one, *other])
    assert result.p_value < FALSE_ALARM / 1e6
    assert result.distance > 2 * compare_samples(one, other).distance


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_greedy_tokens_equal_plain_when_others_are_sampled(engines, name, checkpoint, method):
    """Greedy requests in a batch with sampled ones, with other temperatures and top-k and top-p."""
    sampled = (
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 10},
        {"temperature": 2.0, "top_p": 0.8},
    )
    requests = tuple(
        Request(tokens(10 + index), {"max_tokens": 10, **params}, joins_at=index)
        for index, params in enumerate(({}, sampled[0], {}, *sampled[1:], {}))
    )
    speculative = layerskip(4, 3, draft_sample_method=method)
    scenario = Scenario(str(checkpoint()), requests, speculative)
    plain, drafted = engines.serve(name, scenario.plain(), scenario)
    greedy = [index for index, request in enumerate(requests) if not request.params.get("top_k")]
    greedy = [index for index in greedy if "temperature" not in requests[index].params]
    assert len(greedy) == 3
    for index in greedy:
        assert drafted.token_ids[index] == plain.token_ids[index]
    assert_some_accepted_some_refused(drafted)


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.feature("Requests", "seeds")
def test_samples_repeat_when_requests_have_seeds(engines, name, checkpoint, method):
    requests = tuple(
        Request(tokens(10, i), {"temperature": 1.0, "max_tokens": 8, "seed": i, "n": 1 + i % 2})
        for i in range(4)
    )
    speculative = layerskip(2, 3, draft_sample_method=method)
    scenario = Scenario(str(checkpoint()), requests, speculative, {"seed": 1})
    again = replace(scenario, engine={"seed": 2})
    first, second = engines.serve(name, scenario, again)
    assert first.token_ids == second.token_ids
    assert first.counts == second.counts
    other = tuple(replace(r, params={**r.params, "seed": 99 + i}) for i, r in enumerate(requests))
    (third,) = engines.serve(name, replace(scenario, requests=other))
    assert third.token_ids != first.token_ids


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_samples_repeat_when_a_seeded_prompt_is_asked_again(engines, name, checkpoint, method):
    """The second time it is cached, but for one token."""
    params = {"temperature": 1.0, "seed": 7}
    requests = tuple(Request(tokens(33), params, phase=phase) for phase in range(3))
    speculative = layerskip(2, 4, draft_sample_method=method)
    engine = {"enable_prefix_caching": True}
    (report,) = engines.serve(name, Scenario(str(checkpoint()), requests, speculative, engine))
    assert [output.num_cached_tokens for output in report.outputs] == [0, 32, 32]
    first, *others = report.token_ids
    assert others == [first, first]


@pytest.mark.parametrize("method", [None, "greedy", "probabilistic"])
def test_samples_repeat_when_a_seeded_prompt_comes_in_chunks(engines, name, checkpoint, method):
    """Without drafts too: vLLM's own V1 ends on a CPU."""
    requests = (Request(tokens(70), {"temperature": 1.0, "seed": 7}),)
    speculative = method and layerskip(2, 4, draft_sample_method=method)
    whole = Scenario(str(checkpoint()), requests, speculative)
    in_chunks = replace(whole, engine={"max_num_batched_tokens": 32})
    one, other = engines.serve(name, whole, in_chunks)
    assert any(step.num_mid_prompt for step in other.steps)
    assert one.token_ids == other.token_ids


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_samples_repeat_when_neighbours_draft_more(engines, name, checkpoint, method, num_drafts):
    """A step drafts as many tokens as the request that takes the most."""

    def params(seed, limit):
        extra_args = {"layerskip": {"num_speculative_tokens": limit}}
        return {"temperature": 1.0, "seed": seed, "max_tokens": 16, "extra_args": extra_args}

    requests = (
        Request(tokens(10), params(7, num_drafts)),
        Request(tokens(12), params(8, 4), joins_at=1),
        Request(tokens(40), params(9, 1), joins_at=3),
    )
    speculative = layerskip(2, 4, draft_sample_method=method)
    alone = Scenario(str(checkpoint()), requests[:1], speculative)
    one, other = engines.serve(name, alone, replace(alone, requests=requests))
    assert one.token_ids[0] == other.token_ids[0]
