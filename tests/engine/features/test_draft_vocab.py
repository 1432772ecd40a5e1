"""Drafts that choose among some tokens: the target's logits of these, mapped to its own ids."""

import re
from dataclasses import replace

import pytest

from tests.support.checkpoints import NUM_LAYERS, VOCAB_SIZE
from tests.support.checks import (
    assert_all_accepted,
    assert_same_outputs,
    assert_some_accepted_some_refused,
)
from tests.support.draft_vocabs import make_draft_vocab
from tests.support.exit_adapters import make_exit_adapter
from tests.support.quantized import quantize_to_int8
from tests.support.scenarios import Request, Scenario, layerskip, tokens

FIELD = "num_speculative_tokens"
K = 3
REQUESTS = tuple(
    Request(tokens(length), {"max_tokens": 24}, joins_at=order)
    for order, length in enumerate((20, 7, 41))
)


@pytest.mark.parametrize("chosen", ["said", "unsaid", "some"])
@pytest.mark.feature("Speculative settings", "`draft_vocab`")
def test_tokens_equal_plain_when_drafts_choose_among(runner, checkpoint, tmp_path, chosen):
    """With E = L a draft is accepted where the target's token is one of them, and nowhere else."""
    plain, drafted = serve_drafting_among(runner, checkpoint(), tmp_path, chosen)
    assert_same_outputs(plain, drafted)
    if chosen == "said":
        assert_all_accepted(drafted)
    elif chosen == "unsaid":
        assert drafted.num_accepted == 0
    else:
        assert_some_accepted_some_refused(drafted)


@pytest.mark.parametrize("architecture", ["llama-tied", "gemma2", "olmo2", "int8"])
def test_all_drafts_are_accepted_when_the_model_is(runner, checkpoint, tmp_path, architecture):
    """Also with a head that is the embedding, a soft cap, transformers' layers, int8 layers."""
    if architecture == "int8":
        model = quantize_to_int8(checkpoint(), tmp_path / "int8")
    else:
        model = checkpoint(architecture)
    plain, drafted = serve_drafting_among(runner, model, tmp_path, "said")
    assert_same_outputs(plain, drafted)
    assert_all_accepted(drafted)


def serve_drafting_among(runner, model, folder, chosen):
    """Serve with plain vLLM, and with all layers drafting among tokens that it says, or not."""
    scenario = Scenario(str(model), REQUESTS)
    (plain,) = runner.serve(scenario)
    said = {token for texts in plain.token_ids for text in texts for token in text}
    everything = set(range(VOCAB_SIZE))
    assert len(everything - said) > 50
    token_ids = {"said": said, "unsaid": everything - said, "some": range(0, VOCAB_SIZE, 2)}
    file = make_draft_vocab(folder / "ids.json", token_ids[chosen])
    speculative = layerskip(NUM_LAYERS, K, draft_vocab=file)
    (drafted,) = runner.serve(replace(scenario, speculative=speculative))
    return plain, drafted


@pytest.mark.parametrize(
    "settings",
    [
        {"draft_sample_method": "probabilistic"},
        {"num_speculative_tokens_per_batch_size": [[1, 1, 3], [2, 4, 1]]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_tokens_equal_plain_when_another_setting_stands_beside(
    runner, checkpoint, tmp_path, settings
):
    file = make_draft_vocab(tmp_path / "ids.json", range(0, VOCAB_SIZE, 2))
    speculative = layerskip(4, K, draft_vocab=file, **settings)
    plain, drafted = runner.pair(Scenario(str(checkpoint()), REQUESTS, speculative))
    assert_same_outputs(plain, drafted)
    assert_some_accepted_some_refused(drafted)


def test_tokens_equal_plain_when_adapter_grammars_and_own_lengths_stand_beside(
    runner, checkpoint, tmp_path
):
    """All in one batch; no draft is accepted that is not in the vocabulary."""
    limits = (None, 1, None, 2, 0)
    grammars = ({"regex": r"[ -~]{20}-[0-9]{4}"}, {"regex": r"[a-z]{20}-[ -~]{4}"})
    requests = tuple(
        Request(tokens(9 + 7 * index), {"max_tokens": 40, **params}, joins_at=index)
        for index, params in enumerate(
            {} if limit is None else {"extra_args": {"layerskip": {FIELD: limit}}}
            for limit in limits
        )
    )
    requests = (
        *(
            replace(r, params={**r.params, "ignore_eos": False, "structured_outputs": grammar})
            for r, grammar in zip(requests, grammars, strict=False)
        ),
        *requests[len(grammars) :],
    )
    engine = {
        "structured_outputs_config": {"backend": "xgrammar"},
        "per_request_spec_decode_metrics": "detailed",
    }
    settings = {
        "method": "layerskip",
        "draft_vocab": make_draft_vocab(tmp_path / "ids.json", range(0, VOCAB_SIZE, 2)),
    }
    adapters = [
        make_exit_adapter(tmp_path / str(std), std, exit_layer=NUM_LAYERS - 1) for std in (0.0, 0.2)
    ]
    scenario = Scenario(str(checkpoint()), requests, engine=engine)
    plain, untrained, drafted = runner.serve(
        scenario.plain(),
        *(replace(scenario, speculative={**settings, "exit_adapter": str(a)}) for a in adapters),
    )
    assert drafted.counts != untrained.counts
    for report in (untrained, drafted):
        assert_same_outputs(plain, report)
        assert_some_accepted_some_refused(report)
        answers = [output.completions[0] for output in report.outputs]
        drafted_lens = [answer.spec_decode.get("per_step_drafted", []) for answer in answers]
        assert [max(lens, default=0) for lens in drafted_lens] == [K, 1, K, 2, 0]
        for grammar, answer in zip(grammars, answers, strict=False):
            assert re.fullmatch(grammar["regex"], answer.text)
        for answer in answers[2:4]:
            assert all(token % 2 == 0 for token in find_accepted(answer))


def find_accepted(completion):
    """Return the drafts in an output, of a request that drafts in every step after the first."""
    found, start = [], 1
    for num_accepted in completion.spec_decode["per_step_accepted"]:
        found += completion.token_ids[start : start + num_accepted]
        start += num_accepted + 1
    assert start >= len(completion.token_ids)
    return found


@pytest.mark.parametrize("way", ["in place", "load_weights"])
def test_all_drafts_are_accepted_when_the_head_was_changed(runner, checkpoint, tmp_path, way):
    """With E = L and all tokens, unless the rows that drafts read are still the old head's."""
    requests = tuple(Request(tokens(15), {"max_tokens": 10}, phase=phase) for phase in (0, 1))
    file = make_draft_vocab(tmp_path / "ids.json", range(VOCAB_SIZE))
    speculative = layerskip(NUM_LAYERS, K, draft_vocab=file)
    scenario = Scenario(str(checkpoint()), requests, speculative)
    job = "tests.support.weights_job:serve_with_new_head"
    plain = runner.run(job, scenario.plain(), way)
    drafted = runner.run(job, scenario, way)
    before, after = plain.token_ids
    assert before != after
    assert drafted.token_ids == plain.token_ids
    assert_all_accepted(drafted)


def test_all_drafts_are_accepted_when_another_checkpoint_was_loaded_in_place(
    runner, checkpoint, tmp_path
):
    requests = tuple(Request(tokens(15), {"max_tokens": 10}, phase=phase) for phase in (0, 1))
    file = make_draft_vocab(tmp_path / "ids.json", range(VOCAB_SIZE))
    speculative = layerskip(NUM_LAYERS, K, draft_vocab=file)
    scenario = Scenario(str(checkpoint()), requests, speculative)
    job = "tests.support.weights_job:serve_with_reload"
    before, after = runner.run(job, scenario, str(checkpoint(seed=1)))
    assert after.num_drafts > before.num_drafts
    assert_all_accepted(after)
