"""Structured output: what a grammar allows is drafted, verified and the same as plain vLLM's."""

import json
import re

import pytest

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
