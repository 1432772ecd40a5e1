"""Verification that begins at the exit, beside settings and weights of other kinds."""

from dataclasses import replace

import pytest

from tests.support.checkpoints import VOCAB_SIZE
from tests.support.checks import assert_same_outputs, assert_some_accepted_some_refused
from tests.support.draft_vocabs import make_draft_vocab
from tests.support.engine_process import RunnerProcess
from tests.support.exit_adapters import make_exit_adapter
from tests.support.quantized import quantize_to_int8
from tests.support.scenarios import Request, Scenario, layerskip, tokens

COUNT = "tests.support.reuse_job:serve_and_count_verifications"
K = 3
REQUESTS = tuple(
    Request(tokens(length), {"max_tokens": 20}, joins_at=order)
    for order, length in enumerate((20, 7, 41))
)


@pytest.mark.parametrize("beside", ["int8", "exit_adapter", "draft_vocab", "fp8 cache", "tiers"])
def test_tokens_equal_plain_when_it_stands_beside(runner, checkpoint, tmp_path, beside):
    model, settings, engine = checkpoint(), {"exit_layer": 4}, {}
    if beside == "int8":
        model = quantize_to_int8(model, tmp_path / "int8")
    elif beside == "exit_adapter":
        settings = {"exit_adapter": str(make_exit_adapter(tmp_path / "adapter", 0.2))}
    elif beside == "draft_vocab":
        settings["draft_vocab"] = make_draft_vocab(tmp_path / "ids.json", range(0, VOCAB_SIZE, 2))
    elif beside == "fp8 cache":
        engine = {"kv_cache_dtype": "fp8"}
    else:
        settings["num_speculative_tokens_per_batch_size"] = [[1, 1, K], [2, 4, 1]]
    off = {"method": "layerskip", "num_speculative_tokens": K, **settings}
    scenario = Scenario(str(model), REQUESTS, off, engine)
    plain, usual = runner.serve(scenario.plain(), scenario)
    on = replace(scenario, speculative={**off, "reuse_exit_states": "on"})
    reused, num_steps = runner.run(COUNT, on)
    assert num_steps >= 4
    assert_same_outputs(plain, reused)
    assert reused.counts == usual.counts
    assert_some_accepted_some_refused(reused)


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_tokens_equal_those_without_when_requests_have_seeds(runner, checkpoint, method):
    requests = tuple(
        replace(r, params={**r.params, "temperature": 0.5, "seed": seed})
        for seed, r in enumerate(REQUESTS)
    )
    off = layerskip(4, K, draft_sample_method=method)
    scenario = Scenario(str(checkpoint()), requests, off)
    (usual,) = runner.serve(scenario)
    on = replace(scenario, speculative={**off, "reuse_exit_states": "on"})
    reused, num_steps = runner.run(COUNT, on)
    assert num_steps >= 4
    assert reused.token_ids == usual.token_ids
    assert reused.counts == usual.counts
    assert_some_accepted_some_refused(reused)


def test_tokens_equal_plain_when_both_parts_are_compiled(engines, checkpoint, tmp_path):
    """In a process of its own, whose engines keep what they compile on disk apart from others'."""
    model = str(checkpoint(num_hidden_layers=4))
    scenario = Scenario(model, REQUESTS, layerskip(2, K))
    plain, usual = engines.serve("v1", scenario.plain(), scenario)
    on = replace(
        scenario,
        speculative={**scenario.speculative, "reuse_exit_states": "on"},
        engine={"enforce_eager": False},
    )
    process = RunnerProcess("v1", tmp_path)
    try:
        reused, num_steps = process.run(COUNT, on)
    finally:
        process.stop()
    assert num_steps >= 4
    assert_same_outputs(plain, reused)
    assert reused.counts == usual.counts
