"""One engine of `layerskip-vllm verify`, in a process of its own: what it says to all prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerskip_vllm.tools.server.metrics import SpecDecodeCounters

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
    from vllm.inputs import TokensPrompt

    from layerskip_vllm.tools.verify.command import VerifyConfig

_NUM_LOGPROBS = 5
_NUM_SAMPLED_PROMPTS = 4
# The first comes from the prompt; a draft and its verification follow.
_NUM_SAMPLED_TOKENS = 6


@dataclass(frozen=True)
class ScoredCompletion:
    """A greedy completion."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]  # by token, of the likeliest ids and its own


@dataclass(frozen=True)
class EngineJob:
    """What an engine is to do."""

    config: VerifyConfig
    prompts: Sequence[str]
    engine: Mapping[str, Any]  # arguments of vLLM's `LLM`
    is_reversed: bool  # prompts come last first and in two halves: batches of other shapes
    accepts_everything: bool  # verification is taken out of Model Runner V1


@dataclass(frozen=True)
class EngineOutput:
    """All that an engine gave."""

    runner: str  # V1 or V2
    device: str
    dtype: str  # such as float32
    speculation: str | None  # in words; None for plain vLLM
    num_speculative_tokens: int  # K; 0 for plain vLLM
    num_draft_tokens: int  # in the greedy completions
    num_accepted_tokens: int  # of these
    greedy: tuple[ScoredCompletion, ...]  # by prompt
    samples: tuple[tuple[tuple[int, ...], ...], ...]  # by prompt, by sample

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that was accepted; None without drafts."""
        if self.num_draft_tokens == 0:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens


def complete(job: EngineJob) -> EngineOutput:
    """Start an engine and have it complete prompts greedily and by sampling."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    llm = LLM(**job.engine, disable_log_stats=False)
    if job.accepts_everything:
        llm.collective_rpc(accept_everything)
    tokenizer = llm.get_tokenizer()
    prompts: list[TokensPrompt] = [
        {"prompt_token_ids": tokenizer.encode(text)[: job.config.num_prompt_tokens]}
        for text in job.prompts
    ]
    config = llm.llm_engine.vllm_config
    speculation = config.speculative_config
    greedy = SamplingParams(
        temperature=0, max_tokens=job.config.max_tokens, ignore_eos=True, logprobs=_NUM_LOGPROBS
    )
    sampling = SamplingParams(
        temperature=1,
        max_tokens=_NUM_SAMPLED_TOKENS,
        ignore_eos=True,
        n=job.config.num_samples,
        detokenize=False,
    )
    completions = _generate(llm, prompts, greedy, job.is_reversed)
    counters = SpecDecodeCounters.read_own()
    sampled = _generate(llm, prompts[:_NUM_SAMPLED_PROMPTS], sampling, job.is_reversed)
    return EngineOutput(
        runner="V2" if config.use_v2_model_runner else "V1",
        device=current_platform.get_device_name(),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        speculation=repr(speculation) if speculation else None,
        num_speculative_tokens=config.num_speculative_tokens,
        num_draft_tokens=counters.num_draft_tokens,
        num_accepted_tokens=counters.num_accepted_tokens,
        greedy=tuple(_convert(output.outputs[0]) for output in completions),
        samples=tuple(tuple(tuple(c.token_ids) for c in output.outputs) for output in sampled),
    )


def accept_everything(worker: Any) -> None:
    """Take verification out of a worker's Model Runner V1: every draft is accepted."""
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.rejection_sample = accept_all


def accept_all(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Take the arguments of vLLM's function; return `[num_reqs, max_spec_len + 1] int32`."""
    output = draft_token_ids.new_full((len(num_draft_tokens), max_spec_len + 1), -1)
    drafts = torch.split(draft_token_ids, num_draft_tokens)
    for row, draft, bonus in zip(output, drafts, bonus_token_ids, strict=True):
        row[: len(draft)] = draft
        row[len(draft)] = bonus
    return output.int()


def _generate(
    llm: LLM, prompts: list[TokensPrompt], params: SamplingParams, is_reversed: bool
) -> list[RequestOutput]:
    """Complete prompts, in their order whatever order they are served in."""
    if not is_reversed:
        return llm.generate(prompts, params, use_tqdm=False)
    backwards = prompts[::-1]
    half = (len(prompts) + 1) // 2
    outputs = [
        output
        for part in (backwards[:half], backwards[half:])
        if part
        for output in llm.generate(part, params, use_tqdm=False)
    ]
    return outputs[::-1]


def _convert(completion: CompletionOutput) -> ScoredCompletion:
    assert completion.logprobs is not None
    return ScoredCompletion(
        tuple(completion.token_ids),
        tuple(
            {token_id: logprob.logprob for token_id, logprob in position.items()}
            for position in completion.logprobs
        ),
    )
