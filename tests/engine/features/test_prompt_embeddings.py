"""Prompts given as embeddings: their tokens are unknown, and drafts need none of them."""

import pytest

from tests.support.checks import assert_same_outputs, assert_some_accepted_some_refused
from tests.support.scenarios import Request, Scenario, layerskip, tokens

pytestmark = pytest.mark.feature("Requests", "prompt embeddings")


def test_outputs_equal_those_of_tokens_when_prompts_are_embeddings(runner, checkpoint):
    given = {"enable_prompt_embeds": True}
    prompts = tuple(tokens(length, length) for length in (20, 45, 7))
    as_tokens = tuple(Request(prompt, {"max_tokens": 14}) for prompt in prompts)
    as_embeddings = tuple(
        Request(prompt, {"max_tokens": 14}, as_embeddings=True) for prompt in prompts[:2]
    )
    model = str(checkpoint())
    expected, _ = runner.pair(Scenario(model, as_tokens, layerskip(2, 4)))
    mixed = Scenario(model, (*as_embeddings, as_tokens[2]), layerskip(2, 4), given)
    plain, drafted = runner.pair(mixed)
    assert_same_outputs(plain, drafted)
    assert drafted.token_ids == expected.token_ids
    assert_some_accepted_some_refused(drafted)
