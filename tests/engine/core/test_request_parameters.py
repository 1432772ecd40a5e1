"""What a request can ask for beside tokens: ends, penalties, log probabilities, several outputs.

All requests of this file are one batch, served once a runner and depth; each test looks at one.
"""

from dataclasses import dataclass

import pytest

from tests.support.checkpoints import NUM_LAYERS
from tests.support.checks import assert_close_logprobs
from tests.support.scenarios import Completion, Output, Report, Request, Scenario, layerskip, tokens

PROMPT = tokens(20)
MAX_TOKENS = 12
TOKEN_IDS = [5, 6, 7, 250]
BIASES = {3: -100.0, 40: 3.5, 17: 3.5, 150: 3.5, 77: -2.0}


@dataclass(frozen=True)
class Served:
    """A batch by the names of its requests, from plain vLLM and with drafts.

    Attributes:
        greedy: What the prompt gives without any parameters.
        end: Where the tests about ends want the output to end: an index into `greedy`, two or
            more tokens before the end of a first draft of five that is accepted whole.
    """

    names: tuple[str, ...]
    greedy: Completion
    end: int
    plain: Report
    drafted: Report

    def outputs(self, name: str) -> tuple[Output, Output]:
        index = self.names.index(name)
        return self.plain.outputs[index], self.drafted.outputs[index]

    def only(self, name: str) -> Completion:
        """The completion with drafts, seen to be the same as without."""
        plain, drafted = (output.completions for output in self.outputs(name))
        assert len(plain) == len(drafted) == 1
        for field in ("token_ids", "text", "finish_reason", "stop_reason"):
            assert getattr(drafted[0], field) == getattr(plain[0], field)
        return drafted[0]


@pytest.fixture(scope="module", params=[(NUM_LAYERS, 5), (2, 3)], ids=["all-accepted", "E=2"])
def served(runner, checkpoint, request) -> Served:
    exit_layer, num_speculative_tokens = request.param
    params = {"max_tokens": MAX_TOKENS}
    (first,) = runner.serve(Scenario(str(checkpoint()), (Request(PROMPT, params),)))
    (greedy,) = first.outputs[0].completions
    ids = greedy.token_ids
    end = next(i for i in (3, 2) if ids[i] not in ids[:i])
    pair = token_text(greedy, end - 2) + token_text(greedy, end - 1)
    character = next(i for i in ids if 2 <= i < 97)
    requests = {
        "max_tokens": {"max_tokens": 1},
        "eos": {"ignore_eos": False},
        "min_tokens": {"ignore_eos": False, "min_tokens": end + 3},
        "stop_token": {"stop_token_ids": [ids[end]]},
        "stop_string": {"stop": [pair]},
        "included_stop_string": {"stop": [pair], "include_stop_str_in_output": True},
        "penalties": {
            "repetition_penalty": 1.3,
            "presence_penalty": 1.0,
            "frequency_penalty": 1.0,
        },
        "allowed": {"allowed_token_ids": list(range(2, 256, 3))},
        "bad_words": {"bad_words": [chr(character + 29) if character > 2 else "\n"]},
        "logprobs": {"logprobs": 3},
        "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 0},
        "all_logprobs": {"logprobs": -1},
        "logprob_token_ids": {"logprob_token_ids": TOKEN_IDS, "logprobs": len(TOKEN_IDS)},
        "fewer_token_ids": {"logprob_token_ids": TOKEN_IDS[:1]},
        "no_token_ids": {"logprob_token_ids": []},
        "logit_bias": {"logit_bias": BIASES},
        "penalized_bias": {"logit_bias": BIASES, "repetition_penalty": 1.3},
        # Nothing but the likeliest token is left of each distribution.
        "min_p": {"temperature": 1.5, "min_p": 1.0, "seed": 1},
        # vLLM refuses several greedy outputs; the likeliest token alone is the same thing.
        "n": {"n": 2, "temperature": 1.0, "top_p": 1e-4},
    }
    scenario = Scenario(
        # The same weights, and another end of sequence.
        str(checkpoint(eos_token_id=ids[end])),
        tuple(Request(PROMPT, params | own) for own in requests.values()),
        layerskip(exit_layer, num_speculative_tokens),
        {
            "max_num_seqs": 20,
            "max_logprobs": -1,
            "per_request_spec_decode_metrics": "detailed",
        },
    )
    plain, drafted = runner.pair(scenario)
    served = Served(tuple(requests), greedy, end, plain, drafted)
    if exit_layer == NUM_LAYERS:
        # vLLM leaves out the metrics of an output that ends with a stop string.
        for name in ("eos", "stop_token"):
            # The output ended inside a draft: all of it was accepted, past the end.
            assert served.only(name).spec_decode["per_step_accepted"] == [5]
        for name in ("penalties", "allowed", "bad_words", "logit_bias", "penalized_bias", "min_p"):
            assert sum(served.only(name).spec_decode["per_step_accepted"]) > 0
    return served


def token_text(completion: Completion, index: int) -> str:
    """The text of one token; all are one or two characters, pairs from id 98 on."""
    before = sum(2 if i >= 98 else 1 for i in completion.token_ids[:index])
    length = 2 if completion.token_ids[index] >= 98 else 1
    return completion.text[before : before + length]


def test_output_is_one_token_when_max_tokens_is_one(served):
    assert served.only("max_tokens").token_ids == served.greedy.token_ids[:1]


def test_output_ends_with_eos_when_eos_is_inside_a_draft(served):
    completion = served.only("eos")
    assert completion.token_ids == served.greedy.token_ids[: served.end + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_eos_waits_when_min_tokens_is_not_reached(served):
    completion = served.only("min_tokens")
    assert len(completion.token_ids) >= served.end + 3
    assert completion.token_ids[: served.end] == served.greedy.token_ids[: served.end]
    assert completion.token_ids[served.end] != served.greedy.token_ids[served.end]


def test_output_ends_when_stop_token_is_inside_a_draft(served):
    completion = served.only("stop_token")
    assert completion.token_ids == served.greedy.token_ids[: served.end + 1]
    assert completion.stop_reason == served.greedy.token_ids[served.end]


@pytest.mark.feature("Requests", "stop strings, stop tokens, `min_tokens`, EOS")
def test_output_ends_when_stop_string_spans_tokens_of_a_draft(served):
    completion = served.only("stop_string")
    assert completion.token_ids == served.greedy.token_ids[: served.end]
    assert completion.finish_reason == "stop"
    assert completion.text + completion.stop_reason == served.only("included_stop_string").text


@pytest.mark.feature("Requests", "penalties")
def test_tokens_equal_plain_when_penalties_count_drafts(served):
    assert served.only("penalties").token_ids != served.greedy.token_ids


@pytest.mark.feature("Requests", "`bad_words`, `allowed_token_ids`")
def test_tokens_equal_plain_when_tokens_are_allowed_or_banned(served):
    assert all(token_id % 3 == 2 for token_id in served.only("allowed").token_ids)
    assert served.only("bad_words").token_ids != served.greedy.token_ids


@pytest.mark.feature("Requests", "`logprobs`")
def test_logprobs_equal_plain_when_tokens_come_from_drafts(served):
    completion = served.only("logprobs")
    assert completion.token_ids == served.greedy.token_ids
    (plain,), (drafted,) = (output.completions for output in served.outputs("logprobs"))
    assert_close_logprobs(plain, drafted)
    assert all(len(position) == 3 for position in drafted.logprobs)


@pytest.mark.feature("Requests", "`prompt_logprobs`")
def test_prompt_logprobs_equal_plain_when_drafting(served):
    plain, drafted = served.outputs("prompt_logprobs")
    assert served.only("prompt_logprobs").token_ids == served.greedy.token_ids
    assert len(drafted.prompt_logprobs) == len(plain.prompt_logprobs) == len(PROMPT)
    for here, there in zip(plain.prompt_logprobs[1:], drafted.prompt_logprobs[1:], strict=True):
        assert here == pytest.approx(there, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "token_ids"),
    [("logprob_token_ids", TOKEN_IDS), ("fewer_token_ids", TOKEN_IDS[:1])],
)
@pytest.mark.feature("Requests", "`logprob_token_ids`")
def test_logprobs_are_of_the_tokens_asked_for_when_they_come_from_drafts(served, name, token_ids):
    completion = served.only(name)
    (plain,), (drafted,) = (output.completions for output in served.outputs(name))
    assert_close_logprobs(plain, drafted)
    for token_id, position in zip(completion.token_ids, drafted.logprobs, strict=True):
        assert position.keys() == {token_id, *token_ids}


def test_neighbours_keep_their_logprobs_when_token_ids_are_asked_for(served):
    """All tokens of each position for one request, nothing for another."""
    (plain,), (drafted,) = (output.completions for output in served.outputs("all_logprobs"))
    assert_close_logprobs(plain, drafted)
    assert all(len(position) == 256 for position in drafted.logprobs)
    assert served.only("no_token_ids").logprobs is None


@pytest.mark.feature("Requests", "`logit_bias`, `min_p`")
def test_tokens_equal_plain_when_logits_are_biased(served):
    tokens_of = {name: served.only(name).token_ids for name in ("logit_bias", "penalized_bias")}
    assert len({served.greedy.token_ids, *tokens_of.values()}) == 3


def test_tokens_are_the_likeliest_when_min_p_is_one(served):
    assert served.only("min_p").token_ids == served.greedy.token_ids


@pytest.mark.feature("Requests", "`n`")
def test_all_outputs_equal_plain_when_n_is_two(served):
    plain, drafted = served.outputs("n")
    assert [c.token_ids for c in drafted.completions] == [served.greedy.token_ids] * 2
    assert [c.token_ids for c in plain.completions] == [served.greedy.token_ids] * 2
