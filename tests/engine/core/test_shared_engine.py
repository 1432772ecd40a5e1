"""The engines that these tests share: of the vLLM that is tested, and as good as new each time."""

from importlib import import_module

from tests.support.checks import assert_some_accepted_some_refused
from tests.support.scenarios import Request, Scenario, layerskip, tokens


def test_all_is_the_same_when_an_engine_serves_once_more(runner, checkpoint):
    """Sampled and greedy requests, cached prompts, and one that leaves while drafts are made."""
    prompt = tokens(40)
    requests = (
        Request(prompt, {"max_tokens": 12}),
        Request(tokens(9), {"max_tokens": 10, "temperature": 1.0}),
        Request(tokens(20), {"max_tokens": 40}, aborts_after=4),
        Request(prompt, {"max_tokens": 9, "temperature": 0.5}, phase=1),
        Request(tokens(12), {"max_tokens": 40}, aborts_after=1, phase=1),
    )
    engine = {"enable_prefix_caching": True}
    scenario = Scenario(str(checkpoint()), requests, layerskip(2, 3), engine)
    first, second = runner.run("tests.support.jobs:serve_twice", scenario)
    assert second == first
    assert first.outputs[3].num_cached_tokens == 32
    assert_some_accepted_some_refused(first)


def test_vllm_is_that_of_the_tests_when_a_runner_has_a_process_of_its_own(runner):
    """Else tests of another vLLM, whose Python stands on PYTHONPATH, would test this one."""
    assert runner.run("tests.support.jobs:find_vllm") == import_module("vllm").__file__
