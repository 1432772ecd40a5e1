"""One engine of `layerskip-vllm verify`, in a process of its own: what it says to all prompts.

Started by `runs` as `python -m layerskip_vllm.tools.verify.engine_run JOB RESULT`; both are JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm import LLM

NUM_LOGPROBS = 5


def main() -> None:
    """Read the job, run it, write what it gave."""
    job_path, result_path = map(Path, sys.argv[1:])
    result_path.write_text(json.dumps(run(json.loads(job_path.read_text()))))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start an engine and have it complete prompts greedily and by sampling.

    Args:
        job: `engine`, the arguments of vLLM's `LLM`; `prompts`; `num_prompt_tokens`, to which they
            are cut; `is_reversed`, whether they come last first and in two halves, so that batches
            have other shapes; `accepts_everything`, whether verification is taken out of Model
            Runner V1; `max_tokens`; `num_sampled_prompts`, `num_samples` and `num_sampled_tokens`.

    Returns:
        What `results.Result` reads.
    """
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    llm = LLM(**job["engine"], disable_log_stats=False)
    if job["accepts_everything"]:
        llm.collective_rpc(accept_everything)
    tokenizer = llm.get_tokenizer()
    prompts = [
        {"prompt_token_ids": tokenizer.encode(text)[: job["num_prompt_tokens"]]}
        for text in job["prompts"]
    ]
    config = llm.llm_engine.vllm_config
    speculation = config.speculative_config
    greedy = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=NUM_LOGPROBS
    )
    sampling = SamplingParams(
        temperature=1,
        max_tokens=job["num_sampled_tokens"],
        ignore_eos=True,
        n=job["num_samples"],
        detokenize=False,
    )
    completions = _complete(llm, prompts, greedy, job["is_reversed"])
    counts = _count_drafts(llm)
    sampled = _complete(llm, prompts[: job["num_sampled_prompts"]], sampling, job["is_reversed"])
    return {
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "device": current_platform.get_device_name(),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "speculation": repr(speculation) if speculation else None,
        "num_speculative_tokens": config.num_speculative_tokens,
        **counts,
        "greedy": [_convert(output.outputs[0]) for output in completions],
        "samples": [[list(c.token_ids) for c in output.outputs] for output in sampled],
    }


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
    """The arguments of vLLM's function and its result: `[num_reqs, max_spec_len + 1] int32`."""
    output = draft_token_ids.new_full((len(num_draft_tokens), max_spec_len + 1), -1)
    drafts = draft_token_ids.split(num_draft_tokens)
    for row, draft, bonus in zip(output, drafts, bonus_token_ids, strict=True):
        row[: len(draft)] = draft
        row[len(draft)] = bonus
    return output.int()


def _complete(llm: LLM, prompts: list[Any], params: Any, is_reversed: bool) -> list[Any]:
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


def _count_drafts(llm: LLM) -> dict[str, int]:
    names = ("num_draft_tokens", "num_accepted_tokens")
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {name: values.get(f"vllm:spec_decode_{name}", 0) for name in names}


def _convert(completion: Any) -> dict[str, Any]:
    return {
        "token_ids": list(completion.token_ids),
        "logprobs": [
            {token_id: logprob.logprob for token_id, logprob in position.items()}
            for position in completion.logprobs
        ],
    }


if __name__ == "__main__":
    main()
