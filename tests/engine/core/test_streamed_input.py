"""Sessions whose prompts come turn by turn, as `AsyncLLM.generate` takes them."""

import pytest

from tests.support.checkpoints import NUM_LAYERS, VOCAB_SIZE
from tests.support.checks import assert_same_outputs
from tests.support.scenarios import Request, Scenario, layerskip, tokens


@pytest.mark.parametrize("exit_layer", [2, NUM_LAYERS], ids=["E=2", "all-accepted"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.feature("Requests", "streamed input")
def test_tokens_equal_plain_when_turns_end_within_a_draft(runner, checkpoint, is_async, exit_layer):
    """A turn ends with `max_tokens` or a stop token; what was accepted after that is no input."""
    turns = (tokens(2), tokens(30), tokens(1), tokens(40, 1))
    stop = {"stop_token_ids": list(range(0, VOCAB_SIZE, 8)), "max_tokens": 20}
    few = {"extra_args": {"layerskip": {"num_speculative_tokens": 2}}}
    requests = (
        Request(tokens(20), {"max_tokens": 3}, turns=turns),
        Request(tokens(9, 1), stop, turns=turns, joins_at=1),
        Request(tokens(7, 1), {"max_tokens": 4, **few}, turns=turns, joins_at=2),
        Request(tokens(12), {"max_tokens": 40}),
    )
    scenario = Scenario(str(checkpoint()), requests, layerskip(exit_layer, 4), is_async=is_async)
    plain, drafted = runner.pair(scenario)
    assert_same_outputs(plain, drafted)
    for output in drafted.outputs[:3]:
        assert len(output.completions) == 1 + len(turns)
    assert {c.finish_reason for c in drafted.outputs[1].completions} >= {"stop"}
