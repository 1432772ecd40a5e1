"""`min_p` and `logit_bias` at each token that is verified, compared with vLLM's own processors."""

from types import SimpleNamespace

import pytest
import torch

from layerskip_vllm.hooks.logits_fixes import _add_biases, _apply_sampling_constraints

VOCAB_SIZE = 16
NUM_DRAFT_TOKENS = [2, 0, 3, 1]


def test_biases_are_added_to_all_drafts_of_their_request():
    """The second request has no draft in this step, the third no biases."""
    biases = {0: {3: 1.5, 9: -100.0}, 1: {2: 7.0}, 3: {3: -2.0}}
    expected = torch.randn(sum(NUM_DRAFT_TOKENS), VOCAB_SIZE)
    logits = expected.clone()
    for row, request in enumerate([0, 0, 2, 2, 2, 3]):
        for token_id, bias in biases.get(request, {}).items():
            expected[row, token_id] += bias
    _add_biases(SimpleNamespace(biases=biases), logits, NUM_DRAFT_TOKENS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_nothing_is_added_when_no_request_with_biases_has_drafts():
    logits = torch.zeros(0, VOCAB_SIZE)
    _add_biases(SimpleNamespace(biases={1: {2: 7.0}}), logits, [0, 0])


def test_tokens_below_min_p_are_cut_at_their_request_s_temperature(monkeypatch):
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor

    def expand(values, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        values = torch.where(values == replace_from, replace_to, values)
        return values.repeat_interleave(torch.tensor(NUM_DRAFT_TOKENS))

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", expand)
    temperature = torch.tensor([0.5, 1.0, 0.0, 2.0])
    min_p = torch.tensor([0.1, 0.5, 0.0, 0.3])
    scheduler = SimpleNamespace(max_num_seqs=4)
    processor = MinPLogitsProcessor(SimpleNamespace(scheduler_config=scheduler), "cpu", False)
    processor.min_p_count, processor.min_p = 3, min_p.unsqueeze(1)
    metadata = SimpleNamespace(
        logitsprocs=SimpleNamespace(argmax_invariant=[processor]), temperature=temperature
    )
    logits = 2 * torch.randn(sum(NUM_DRAFT_TOKENS), VOCAB_SIZE)
    rows = torch.arange(4).repeat_interleave(torch.tensor(NUM_DRAFT_TOKENS))
    divisors = torch.where(temperature == 0, 1.0, temperature)[rows].unsqueeze(1)
    # What vLLM does to one row a request, after the temperature.
    expected = logits / divisors
    processor.min_p = min_p[rows].unsqueeze(1)
    expected = processor.apply(expected)
    processor.min_p = min_p.unsqueeze(1)
    constrain = _apply_sampling_constraints(lambda logits, *_: logits / divisors)
    found = constrain(logits.clone(), None, metadata)
    torch.testing.assert_close(found, expected)
    assert found.isinf().any()
    assert found[2:5].isfinite().all()


@pytest.mark.parametrize(("num_invalid", "num_left"), [(5, 1), (1, 1), (0, 0)])
def test_a_draft_that_was_accepted_is_not_counted_as_invalid(num_invalid, num_left):
    from layerskip_vllm.hooks.vllm_fixes import _make_spec_decoding_stats

    seen = []
    count = _make_spec_decoding_stats(lambda *args: seen.append(args[1:]))
    of_step = {"a": num_invalid, "b": 3}
    count(None, None, 5, 4, num_invalid_spec_tokens=of_step, request_id="a")
    assert of_step == {"a": num_left, "b": 3}
    assert seen == [(None, 5, 4, of_step, "a")]
