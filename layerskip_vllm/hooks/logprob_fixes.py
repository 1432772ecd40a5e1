"""The hooks that return the log probabilities of a request's own tokens with drafts.

`vllm_fixes.FIXES` has them among all others; they know no speculative method.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layerskip_vllm.hooks import install

if TYPE_CHECKING:
    import torch
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker.gpu.input_batch import InputBatch

LOGPROB_FIXES: list[install.Hook] = []

_fix = functools.partial(install.hook, LOGPROB_FIXES)

_SAMPLER = "vllm.v1.sample.sampler:Sampler"
_REJECTION = "vllm.v1.sample.rejection_sampler:RejectionSampler"
_V2_SAMPLER = "vllm.v1.worker.gpu.sample.sampler:Sampler"
_V2_REJECTION = "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler"

Gather = Callable[..., "LogprobsTensors"]


@_fix(
    target=f"{_SAMPLER}.forward",
    relies_on=(f"{_SAMPLER}.gather_logprobs",),
    why="on Model Runner V1, `logprob_token_ids` of one request leave the others their `logprobs`",
    reason="vLLM returns those of the ids alone, for all requests of the step, also without "
    "drafts.",
    process=install.V1_WORKER,
    upstream="not reported yet; 0.33 names it where it refuses beams",
    remove_when="V1 gathers by request, or is dropped",
)
def _forward(original: Any) -> Any:
    """Wrap it: the original gathers log probabilities by request; see `_gathering`."""

    @functools.wraps(original)
    def forward(
        self: Sampler,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        *args: Any,
        **kwargs: Any,
    ) -> SamplerOutput:
        with _gathering(self, sampling_metadata, logits.shape[0]) as metadata:
            output: SamplerOutput = original(self, logits, metadata, *args, **kwargs)
        return output

    return forward


@_fix(
    target=f"{_REJECTION}.forward",
    relies_on=(
        f"{_REJECTION}._get_logprobs_tensors",
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata.max_spec_len",
    ),
    why="on Model Runner V1, `logprob_token_ids` of a request that drafts do not end the engine, "
    "nor does `top_k` in a step without drafts, which is sampled but once",
    reason="The token after a draft is sampled first, and all its logits are asked for; "
    "`logprob_token_ids` has those of the ids returned in their stead, which do not fit. Where no "
    "request has drafts, vLLM goes on to verify logits of no rows, which takes a while on a CPU, "
    "and ends the engine where one request has `top_k` and no `top_p`: no rows have a largest one.",
    process=install.V1_WORKER,
    upstream="not reported yet",
    remove_when="V1's rejection sampler returns `logprob_token_ids` and leaves out what has no "
    "rows, or V1 is dropped",
)
def _reject_and_gather(original: Any) -> Any:
    """Wrap it: the original gathers log probabilities by request; see `_gathering`.

    Without drafts all rows are such as come after a draft.
    """

    @functools.wraps(original)
    def forward(
        self: RejectionSampler,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        if metadata.max_spec_len == 0:
            sampled: SamplerOutput = self.sampler(
                logits, sampling_metadata, predict_bonus_token=True
            )
            return sampled
        num_requests = len(metadata.num_draft_tokens)
        with _gathering(self.sampler, sampling_metadata, num_requests) as gathering:
            output: SamplerOutput = original(self, metadata, draft_probs, logits, gathering)
        return output

    return forward


@contextlib.contextmanager
def _gathering(
    sampler: Sampler, metadata: SamplingMetadata, num_requests: int
) -> Iterator[SamplingMetadata]:
    """Have a sampler return `logprob_token_ids` to those that ask for them, in one call of it.

    Yields:
        The call's metadata, which asks for the likeliest tokens alone.
    """
    if not metadata.logprob_token_ids:
        yield metadata
        return
    sampler.gather_logprobs = functools.partial(  # type: ignore[method-assign]
        _gather_by_request, sampler.gather_logprobs, metadata.logprob_token_ids, num_requests
    )
    try:
        yield replace(
            metadata, max_num_logprobs=metadata.max_num_logprobs or 0, logprob_token_ids=None
        )
    finally:
        del sampler.gather_logprobs  # the class's own is in its place again


def _gather_by_request(
    gather: Gather,
    ids_of_request: Mapping[int, Sequence[int]],
    num_requests: int,
    logprobs: torch.Tensor,
    num_logprobs: int,
    token_ids: torch.Tensor,
) -> LogprobsTensors:
    """Gather a request's `logprob_token_ids`, and the likeliest tokens where it has none.

    Args:
        gather: What gathers the likeliest.
        ids_of_request: By the request's index.
        num_requests: Each has as many rows as any other.
        logprobs: Of all tokens, [num_rows, vocab_size] float32.
        num_logprobs: How many of the likeliest.
        token_ids: Sampled tokens, [num_rows] int64.
    """
    import torch
    from torch.nn.functional import pad
    from vllm.utils.torch_utils import async_tensor_h2d

    likeliest = gather(logprobs, num_logprobs, token_ids)
    num_columns = max(num_logprobs, *map(len, ids_of_request.values()))
    asked = torch.full((num_requests, num_columns), -1)
    for index, token_ids_of_one in ids_of_request.items():
        asked[index, : len(token_ids_of_one)] = torch.tensor(token_ids_of_one)
    rows = asked.repeat_interleave(logprobs.shape[0] // num_requests, 0)
    rows = async_tensor_h2d(rows, logprobs.device)
    is_asked, has_ids, ids = rows >= 0, rows[:, :1] >= 0, rows.clamp(min=0)
    values = logprobs.gather(-1, ids).masked_fill(~is_asked, float("-inf"))

    # The first column is the sampled token's, and stays.
    padding = (0, num_columns - num_logprobs)
    all_ids = pad(likeliest.logprob_token_ids, padding)
    all_values = pad(likeliest.logprobs, padding, value=float("-inf"))
    all_ids[:, 1:] = torch.where(has_ids, ids, all_ids[:, 1:])
    all_values[:, 1:] = torch.where(has_ids, values, all_values[:, 1:])
    return likeliest._replace(logprob_token_ids=all_ids, logprobs=all_values)


@_fix(
    target=f"{_V2_REJECTION}._verify_in_chunks",
    relies_on=(
        f"{_V2_REJECTION}._get_logprobs_tensors",
        "vllm.v1.worker.gpu.sample.logprob:compute_topk_scores",
        "vllm.v1.worker.gpu.sample.logprob:LogprobTokenIdsState.max_num_token_ids",
    ),
    why="on Model Runner V2, a request's `logprob_token_ids` are returned for drafts too",
    reason="Where a step verifies drafts, vLLM returns the likeliest tokens in their stead, or "
    "nothing.",
    process=install.V2_WORKER,
    upstream="not reported yet; 0.33 names it where it refuses beams",
    remove_when="V2's rejection sampler returns `logprob_token_ids`",
)
def _verify_in_chunks(original: Any) -> Any:
    """Wrap it: where some request has such ids, they are put beside what each chunk gathers."""

    @functools.wraps(original)
    def _verify_in_chunks(
        self: Any,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        max_chunk_logits: int,
        max_num_logprobs: int,
        *args: Any,
    ) -> Any:
        given = (self, logits, input_batch, draft_logits, draft_sampled, pos, max_chunk_logits)
        num_ids = self.sampler.logprob_token_ids_state.max_num_token_ids(input_batch.idx_mapping_np)
        if not num_ids:
            return original(*given, max_num_logprobs, *args)
        num_logprobs = max(max_num_logprobs, 0)
        self._get_logprobs_tensors = _scoring(self, input_batch, num_logprobs, num_ids)
        try:
            return original(*given, num_logprobs, *args)
        finally:
            del self._get_logprobs_tensors  # the class's own is in its place again

    return _verify_in_chunks


def _scoring(sampler: Any, input_batch: InputBatch, num_logprobs: int, num_ids: int) -> Gather:
    """Return a `_get_logprobs_tensors` for the chunks of a batch, one call after the other."""
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    gather = sampler._get_logprobs_tensors
    remaining = input_batch.expanded_idx_mapping

    def _get_logprobs_tensors(
        sampled: torch.Tensor, num_sampled: torch.Tensor, logits: torch.Tensor, *args: Any
    ) -> LogprobsTensors:
        nonlocal remaining
        rows, remaining = remaining[: len(logits)], remaining[len(logits) :]
        likeliest = gather(sampled, num_sampled, logits, *args)
        ends = likeliest.cu_num_generated_tokens_tensor
        return compute_topk_scores(
            logits,
            num_logprobs,
            likeliest.logprob_token_ids[:, 0].contiguous(),
            likeliest.cu_num_generated_tokens if ends is None else ends,
            sampler.sampler.logprob_token_ids_state,
            rows,
            num_ids,
            logits_mode=sampler.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    return _get_logprobs_tensors


@_fix(
    target=f"{_V2_SAMPLER}.get_logprobs_dims",
    why="on Model Runner V2, ranks that share out sampling return them for drafts too",
    reason="With `enable_batch_sharded_sampling` they agree on how much a row holds.",
    process=install.V2_WORKER,
    remove_when=f"with the hook on `{_V2_REJECTION}._verify_in_chunks`",
)
def _get_logprobs_dims(original: Any) -> Any:
    """Wrap it: ids count, also in a step that verifies drafts."""

    @functools.wraps(original)
    def get_logprobs_dims(self: Any, idx_mapping_np: Any, include_token_ids: bool = True) -> Any:
        return original(self, idx_mapping_np)

    return get_logprobs_dims
