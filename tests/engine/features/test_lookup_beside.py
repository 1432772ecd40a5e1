"""Copied drafts beside what else shapes a request: grammars, adapters, connectors, sessions."""

from dataclasses import replace

import pytest

from tests.support.checks import assert_same_outputs, completions
from tests.support.lookups import K, copying, repeating, without_lookup
from tests.support.lora_adapters import make_lora_adapter
from tests.support.scenarios import Request, tokens

DETAILED = {"per_request_spec_decode_metrics": "detailed"}
LENGTHS = (0, 3, 1, K, 0, 0, 2)


def assert_copies_are_accepted(runner, scenario, plain, copied, index):
    """Same tokens, and a request that repeats itself gets more drafts accepted than without."""
    (drafted,) = runner.serve(without_lookup(scenario))
    for report in (copied, drafted):
        assert_same_outputs(plain, report)
    accepted = [
        sum(completions(report)[index].spec_decode.get("per_step_accepted", ()))
        for report in (copied, drafted)
    ]
    assert accepted[0] > accepted[1] + 10, accepted


@pytest.mark.feature("Speculative settings", "`lookup` with structured output")
def test_copies_obey_the_grammar_when_output_is_structured(runner, checkpoint):
    """One repeats itself until its grammar ends, which the last copy goes past; two do not."""
    structured = ({"regex": r"(ab-){20}c"}, {"regex": r"[a-d]{4}-[0-9]{6}"})
    requests = (
        *(
            Request(
                tokens(12, seed),
                {"max_tokens": 80, "ignore_eos": False, "structured_outputs": constraint},
                joins_at=seed,
            )
            for seed, constraint in enumerate(structured)
        ),
        Request(tokens(9, 4), {"max_tokens": 20}),
    )
    config = {"backend": "xgrammar"}
    scenario = copying(checkpoint(), *requests, structured_outputs_config=config, **DETAILED)
    plain, copied = runner.pair(scenario)
    assert completions(copied)[0].text == "ab-" * 20 + "c"
    assert_copies_are_accepted(runner, scenario, plain, copied, index=0)


@pytest.mark.feature("Speculative settings", "`lookup` with LoRA")
def test_drafts_have_their_adapter_when_others_are_copied(runner, checkpoint, tmp_path):
    """One text repeats itself at a time; the others' draft steps have their own adapters."""
    first, second = (
        str(make_lora_adapter(tmp_path / str(seed), checkpoint(), seed)) for seed in range(2)
    )
    requests = (
        repeating(20, [7], 40, adapter=first),
        Request(tokens(20), {"max_tokens": 24}, adapter=second),
        Request(tokens(20), {"max_tokens": 12}),
        repeating(9, [9, 12], 40, adapter=second, joins_at=12),
        Request(tokens(7), {"max_tokens": 24}, adapter=first, joins_at=14),
    )
    lora = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    scenario = copying(checkpoint(), *requests, **lora, **DETAILED)
    plain, copied = runner.pair(scenario)
    assert len({plain.outputs[index].token_ids[:12] for index in range(3)}) == 3
    assert_copies_are_accepted(runner, scenario, plain, copied, index=0)


@pytest.mark.feature("Speculative settings", "`lookup` with KV connectors (ExampleConnector)")
def test_copies_are_of_the_whole_prompt_when_its_cache_comes_from_a_connector(
    runner, checkpoint, tmp_path
):
    """The prompts' repeating tokens are not run by the engine that copies them."""
    connector = {
        "kv_connector": "OnceALayerConnector",
        "kv_connector_module_path": "tests.support.kv_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    params = {"allowed_token_ids": [7], "max_tokens": 14}
    requests = tuple(Request((*tokens(50, seed), *[7] * 20), params) for seed in range(2))
    alone = copying(checkpoint(), *requests, **DETAILED)
    plain, copied = runner.pair(alone)
    shared = replace(alone, engine={**alone.engine, "kv_transfer_config": connector})
    # All engines of a process have the one connector: each of these is alone in it.
    saving = runner.run("tests.support.jobs:serve_alone", shared)
    loading = runner.run("tests.support.jobs:serve_alone", shared)
    assert [output.num_cached_tokens for output in loading.outputs] == [64, 64]
    for report in (saving, loading):
        assert_same_outputs(plain, report)
        assert report.counts == copied.counts
        assert report.acceptance == 1  # from the prompt on


@pytest.mark.feature("Speculative settings", "`lookup` with streamed input")
def test_copies_are_of_the_session_when_its_turns_end_within_one(runner, checkpoint):
    """What was accepted after a turn's end is no text of the session's, and is not copied."""
    turns = ((7, 7), tokens(30), (7,) * 9, tokens(40, 1))
    requests = (
        repeating(20, [7], 11, turns=turns),
        repeating(9, [9, 12], 13, turns=turns, joins_at=1),
        Request(tokens(12), {"max_tokens": 40}),
    )
    scenario = copying(checkpoint(), *requests)
    plain, copied = runner.pair(scenario)
    (drafted,) = runner.serve(without_lookup(scenario))
    for report in (copied, drafted):
        assert_same_outputs(plain, report)
        assert [len(output.completions) for output in report.outputs] == [5, 5, 1]
    assert copied.num_accepted > drafted.num_accepted + 40


def test_tokens_equal_plain_when_k_is_auto(runner, checkpoint):
    """Steps that draft nothing look for no copies; the next find them again."""
    scenario = replace(
        copying(
            checkpoint(),
            repeating(20, [7], 60),
            repeating(11, [9, 12], 30, joins_at=5),
            Request(tokens(7), {"max_tokens": 20}, joins_at=8),
            settings={"num_speculative_tokens": f"auto:{K}"},
        ),
        lengths=LENGTHS,
    )
    plain, copied = runner.pair(scenario)
    assert_same_outputs(plain, copied)
    assert {step.num_to_draft for step in copied.steps} == set(LENGTHS)
    for step, after in zip(copied.steps, copied.steps[1:], strict=False):
        assert max(after.draft_lens, default=0) <= step.num_to_draft
    assert copied.acceptance > 0.4
