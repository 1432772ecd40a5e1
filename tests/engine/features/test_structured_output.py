"""Structured output: what a grammar allows is drafted, verified and the same as plain vLLM's."""

import json
import re

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import assert_same_outputs, assert_some_accepted_some_refused
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = [
    pytest.mark.feature("Requests", "structured output: JSON schema, regex, choice"),
]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "large"]},
        "on": {"type": "boolean"},
    },
    "required": ["name", "size", "on"],
    "additionalProperties": False,
}
REGEX = r"[a-d]{4}-[0-9]{6}"
CHOICES = ["breakfast", "broken", "brother"]


def test_output_obeys_the_grammar_when_drafting(runner, checkpoint):
    """A schema, a regex, a choice and free text share a batch."""
    structured = (
        {"json": SCHEMA},
        {"regex": REGEX},
        {"choice": CHOICES},
    )
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
    engine = {
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "per_request_spec_decode_metrics": "detailed",
    }
    scenario = Scenario(str(checkpoint()), requests, layerskip(2, 4), engine)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert_some_accepted_some_refused(drafted)
    answer, matched, chosen, free = (output.completions[0] for output in drafted.outputs)
    assert sum(answer.spec_decode["per_step_accepted"]) > 0
    assert json.loads(answer.text).keys() == SCHEMA["properties"].keys()
    assert re.fullmatch(REGEX, matched.text)
    assert chosen.text in CHOICES
    assert len(free.token_ids) == 20


@pytest.mark.parametrize(
    ("backend", "is_async"),
    [("guidance", False), ("guidance", True), ("outlines", False), ("xgrammar", True)],
    ids=["guidance", "guidance-async", "outlines", "xgrammar-async"],
)
def test_output_goes_on_when_eos_is_inside_a_draft(runner, checkpoint, backend, is_async):
    """A grammar ends with EOS; a request that ignores it is free from there on, as plain vLLM's."""
    scenario = Scenario(str(checkpoint()), (Request(tokens(20)),))
    (report,) = runner.serve(scenario)
    eos = report.outputs[0].token_ids[3]
    anything = {"structured_outputs": {"regex": r"[\s\S]*"}, "max_tokens": 40}
    scenario = Scenario(
        str(checkpoint(eos_token_id=eos)),
        (
            Request(tokens(20), anything),
            Request(tokens(20), {**anything, "ignore_eos": False}),
            Request(tokens(20), {"structured_outputs": {"regex": "[a-d]"}}, joins_at=1),
        ),
        layerskip(NUM_LAYERS, 5),
        {"structured_outputs_config": {"backend": backend}},
        is_async=is_async,
    )
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    assert len(drafted.outputs[0].token_ids) == 40
    assert drafted.outputs[1].token_ids == report.outputs[0].token_ids[:4]
    assert 0 < drafted.num_accepted <= drafted.num_draft_tokens
