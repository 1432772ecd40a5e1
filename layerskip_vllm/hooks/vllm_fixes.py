"""The hooks that fix vLLM itself, for every speculative method; nothing here knows layerskip.

Each is a bug that would make drafts wrong, or end the engine. `plugin` installs them in every
process, also where vLLM has a registry of speculative methods; workers apply them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from layerskip_vllm.hooks import install

if TYPE_CHECKING:
    import torch

FIXES: list[install.Hook] = []

_fix = functools.partial(install.hook, FIXES)


@_fix(
    target="vllm.utils.cpu_triton_utils:_expand_kernel_impl",
    why="on the CPU, sampling with drafts reads each request's temperature, not stray memory",
    reason="And its top-k and top-p. The original converts its output to int64, which for a float "
    "tensor is a copy, fills the copy and drops it.",
    process="each worker on a CPU",
    upstream="[vllm#55005](https://github.com/vllm-project/vllm/issues/55005), open; a fix, "
    "[vllm#42638](https://github.com/vllm-project/vllm/pull/42638), was closed",
    remove_when="vLLM writes to the tensor that it is given, without rounding it",
)
def _expand(original: Any) -> Any:
    """Replace it by the same expansion in PyTorch, written into the tensor that was given."""

    def _expand_kernel_impl(
        output: torch.Tensor,
        input_val: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        replace_from: int,
        replace_to: int,
        MAX_NUM_TOKENS: int | None = None,
    ) -> None:
        num_tokens = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        values = input_val.masked_fill(input_val == replace_from, replace_to)
        output.copy_(values.repeat_interleave(num_tokens))

    return _expand_kernel_impl


@_fix(
    target="vllm.utils.cpu_triton_utils:_rejection_random_sample_kernel_impl",
    why="on the CPU, sampling refuses the placeholder drafts of a prompt that is cached",
    reason="A prompt that is cached but for one token gets placeholder drafts (-1), so that it "
    "looks like any other request that drafts. On the CPU, sampling looks a placeholder's "
    "probability up in the memory before that of token 0, and accepts it at random; tokens then "
    "follow that belong to a later position. vLLM's kernel for GPUs refuses them "
    "([vllm#46533](https://github.com/vllm-project/vllm/pull/46533)).",
    process="each worker on a CPU",
    upstream="not reported yet",
    remove_when="vLLM's CPU kernel refuses negative drafts",
)
def _reject(original: Any) -> Any:
    """Wrap it: token 0 for each placeholder, and a threshold that no ratio reaches."""

    @functools.wraps(original)
    def _rejection_random_sample_kernel_impl(
        output_token_ids: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        draft_token_ids: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_probs: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        recovered_token_ids: torch.Tensor,
        uniform_probs: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(
            output_token_ids,
            cu_num_draft_tokens,
            draft_token_ids.clamp(min=0),
            draft_probs,
            target_probs,
            bonus_token_ids,
            recovered_token_ids,
            uniform_probs.masked_fill(draft_token_ids < 0, float("inf")),
            *args,
            **kwargs,
        )

    return _rejection_random_sample_kernel_impl


@_fix(
    target="vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only",
    why="on the CPU, `top_k` in a step without any draft does not end the engine",
    reason="One request with `top_k` and no `top_p` ends it if no request of its step has a draft, "
    "as in the first step of a request that is alone: the rejection sampler then limits logits of "
    "no rows, whose largest `top_k` there is not. `ngram` has this too.",
    process="each worker on a CPU; on a GPU this path is not taken",
    upstream="not reported yet",
    remove_when="vLLM's `apply_top_k_only` takes logits without rows",
)
def _top_k(original: Any) -> Any:
    """Wrap it: logits without rows are returned as they are."""

    @functools.wraps(original)
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        limited: torch.Tensor = original(logits, k) if logits.shape[0] else logits
        return limited

    return apply_top_k_only
