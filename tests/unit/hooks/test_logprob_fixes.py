"""Log probabilities of a request's own tokens: gathered by request, compared with plain loops."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from layerskip_vllm.hooks.logprob_fixes import _gather_by_request, _gathering, _scoring

VOCAB_SIZE = 12
IDS = {1: [3, 0, 11], 2: [7], 3: []}
NUM_REQUESTS = 4


def gather(logprobs, num_logprobs, token_ids):
    from vllm.v1.outputs import LogprobsTensors

    top = torch.topk(logprobs, num_logprobs, dim=-1)
    ids = torch.cat((token_ids.unsqueeze(-1), top.indices), -1)
    return LogprobsTensors(ids.to(torch.int32), logprobs.gather(-1, ids), token_ids)


@pytest.mark.parametrize("num_rows_each", [1, 3])
@pytest.mark.parametrize("num_logprobs", [0, 2, 5])
def test_ids_are_gathered_by_request_when_others_want_the_likeliest(num_rows_each, num_logprobs):
    num_rows = NUM_REQUESTS * num_rows_each
    logprobs = torch.randn(num_rows, VOCAB_SIZE).log_softmax(-1)
    sampled = torch.randint(VOCAB_SIZE, (num_rows,))
    found = _gather_by_request(gather, IDS, NUM_REQUESTS, logprobs, num_logprobs, sampled)
    num_columns = 1 + max(num_logprobs, 3)
    assert found.logprobs.shape == found.logprob_token_ids.shape == (num_rows, num_columns)
    for row in range(num_rows):
        ids = IDS.get(row // num_rows_each) or logprobs[row].topk(num_logprobs).indices.tolist()
        ids = [int(sampled[row]), *ids]
        assert found.logprob_token_ids[row].tolist()[: len(ids)] == ids
        torch.testing.assert_close(found.logprobs[row, : len(ids)], logprobs[row, ids])
        assert found.logprobs[row, len(ids) :].eq(float("-inf")).all()


def test_sampler_is_as_before_when_a_call_of_it_fails():
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    sampler = Sampler()
    fields = dict.fromkeys(SamplingMetadata.__dataclass_fields__)
    metadata = SamplingMetadata(**fields | {"logprob_token_ids": IDS})
    with contextlib.suppress(RuntimeError), _gathering(sampler, metadata, 4) as given:
        assert (given.logprob_token_ids, given.max_num_logprobs) == (None, 0)
        assert sampler.gather_logprobs is not Sampler.gather_logprobs
        raise RuntimeError
    assert sampler.gather_logprobs is Sampler.gather_logprobs


def test_each_row_is_of_its_request_when_a_batch_is_verified_in_chunks(monkeypatch):
    """On Model Runner V2; a batch of more than a GiB of logits is verified in several."""
    from vllm.v1.worker.gpu.sample import logprob

    asked = []
    monkeypatch.setattr(logprob, "compute_topk_scores", lambda *args, **kwargs: asked.append(args))
    ends = torch.tensor([0, 2])
    tensors = SimpleNamespace(
        logprob_token_ids=torch.tensor([[5, 0], [6, 0]]),
        cu_num_generated_tokens=[0, 2],
        cu_num_generated_tokens_tensor=None,
    )
    own = SimpleNamespace(logprob_token_ids_state=None, logprobs_mode="raw_logprobs")
    sampler = SimpleNamespace(sampler=own, _get_logprobs_tensors=lambda *args: tensors)
    rows = torch.tensor([4, 4, 9, 2, 2])
    score = _scoring(sampler, SimpleNamespace(expanded_idx_mapping=rows), 1, 3)
    for num_rows in (2, 1, 2):
        score(None, None, torch.zeros(num_rows, VOCAB_SIZE))
        tensors.cu_num_generated_tokens_tensor = ends  # where the device alone knows them
    assert [args[5].tolist() for args in asked] == [[4, 4], [9], [2, 2]]
    assert asked[0][2].tolist() == [5, 6]
    assert [args[3] for args in asked] == [[0, 2], ends, ends]
    assert {(args[1], args[6]) for args in asked} == {(1, 3)}
