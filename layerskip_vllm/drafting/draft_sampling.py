"""How the tokens of a draft step are sampled, on Model Runner V1; called by `proposer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from vllm.v1.sample.ops.topk_topp_sampler import random_sample
from vllm.v1.sample.sampler import _SAMPLING_EPS

from layerskip_vllm.config.request import max_num_drafts

if TYPE_CHECKING:
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

# The draft tokens of a step, `[num_reqs] int64`, and what they were sampled from where they were
# sampled, `[num_reqs, vocab_size] float32`.
Sampled: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]


def sample_tokens(
    logits: torch.Tensor, sampling_metadata: SamplingMetadata, use_fp64_gumbel: bool
) -> Sampled:
    """Sample a draft token of each request at its temperature.

    A request that has a seed draws from it, so that it gets the same tokens again.
    """
    if sampling_metadata.temperature is None:
        return logits.argmax(dim=-1), None
    is_greedy = sampling_metadata.temperature < _SAMPLING_EPS
    temperature = torch.where(is_greedy, 1.0, sampling_metadata.temperature)
    probs = (logits / temperature.unsqueeze(1)).softmax(dim=-1, dtype=torch.float32)
    token_ids = random_sample(probs.clone(), sampling_metadata.generators, use_fp64_gumbel)
    return torch.where(is_greedy, probs.argmax(dim=-1), token_ids), probs


def generators_of_step(
    step: int, generators: dict[int, torch.Generator], runner: GPUModelRunner
) -> dict[int, torch.Generator]:
    """Leave out the seeds of requests that do not take this step's draft.

    A batch drafts as many tokens as the request that takes the most. A seed that was drawn from
    for each of them would give other tokens beside a neighbour than alone.
    """
    req_ids = runner.input_batch.req_ids
    limits = {
        index: max_num_drafts(runner.requests[req_ids[index]].sampling_params)
        for index in generators
    }
    return {
        index: generators[index] for index, limit in limits.items() if limit is None or step < limit
    }
