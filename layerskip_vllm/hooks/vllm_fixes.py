"""The hooks that fix vLLM itself, for every speculative method; nothing here knows layerskip.

Each is a bug that makes drafts wrong or slow, or ends the engine. `plugin` installs them in every
process, also where vLLM has a registry of speculative methods.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from layerskip_vllm.hooks import install
from layerskip_vllm.hooks.logits_fixes import LOGITS_FIXES
from layerskip_vllm.hooks.logprob_fixes import LOGPROB_FIXES
from layerskip_vllm.hooks.lora_fixes import LORA_FIXES

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request
    from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

FIXES: list[install.Hook] = [*LOGPROB_FIXES, *LOGITS_FIXES, *LORA_FIXES]

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


_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


@_fix(
    target=f"{_RUNNER}._sample",
    relies_on=(
        f"{_RUNNER}.discard_request_mask",
        "vllm.v1.worker.gpu_input_batch:InputBatch.generators",
    ),
    why="on Model Runner V1, a seed is not drawn from in the middle of a prompt",
    reason="A token is sampled after each part of a prompt and dropped; afterwards the seed's "
    "generator is set back by what one draw takes on a GPU. A generator on a CPU cannot be set "
    "back, which ends the engine, also without drafts; and probabilistic drafts draw more often.",
    process=install.V1_WORKER,
    upstream="not reported yet",
    remove_when="V1 draws from no seed for tokens that it drops, or is dropped itself",
)
def _sample(original: Any) -> Any:
    """Wrap it: take the generators of such requests out of the batch, also for what is drafted."""

    @functools.wraps(original)
    def _sample(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        for index in [*generators]:
            if self.discard_request_mask.np[index]:
                del generators[index]
        return original(self, *args, **kwargs)

    return _sample


@_fix(
    target=f"{_RUNNER}._bookkeeping_sync",
    relies_on=(f"{_RUNNER}.requests",),
    why="the generators that were taken out of the batch are back in the next step",
    process=install.V1_WORKER,
    upstream="not reported yet",
    remove_when=f"with the hook on `{_RUNNER}._sample`",
)
def _bookkeeping_sync(original: Any) -> Any:
    """Wrap it: the original finds none to set back; then they are put in again."""

    @functools.wraps(original)
    def _bookkeeping_sync(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        for index, req_id in enumerate(self.input_batch.req_ids):
            generator = self.requests[req_id].generator
            if generator is not None:
                self.input_batch.generators[index] = generator
        return result

    return _bookkeeping_sync


@_fix(
    target="vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request",
    why="a session with streamed input goes on from the tokens that it has, not from drafts",
    reason="A turn may end before the last draft that was accepted in its last step. Without "
    "asynchronous scheduling vLLM then counts tokens as computed that are not in the session: the "
    "next turn is answered as if its first tokens were others, or, if it is short, has no token "
    "left to compute, which ends the engine.",
    process="the engine core",
    upstream="fixed in 0.33.0",
    remove_when="0.32 is no longer supported",
)
def _handle_stopped_request(original: Any) -> Any:
    """Wrap it: all of a turn's tokens but its last, at most, count as computed.

    With asynchronous scheduling what is in flight counts too, until the original takes it away.
    """

    @functools.wraps(original)
    def _handle_stopped_request(self: Scheduler, request: Request) -> bool:
        if request.resumable:
            num_computed = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, num_computed)
        is_finished: bool = original(self, request)
        return is_finished

    return _handle_stopped_request


@_fix(
    target="vllm.v1.structured_output.backend_guidance:GuidanceGrammar.accept_tokens",
    why="with the guidance backend, a draft that goes on after EOS is no error",
    reason="A grammar allows everything after its end, which a request with `ignore_eos` goes on "
    "to. vLLM gives the grammar all tokens of a step at once, and what comes after EOS is refused: "
    "the request ends with an error. The other backends stop at EOS.",
    process="the engine core",
    upstream="not reported yet",
    remove_when="vLLM's `GuidanceGrammar.accept_tokens` stops at EOS",
)
def _accept_tokens(original: Any) -> Any:
    """Wrap it: the grammar takes tokens one by one, as without drafts."""

    @functools.wraps(original)
    def accept_tokens(self: GuidanceGrammar, request_id: str, tokens: list[int]) -> bool:
        return all(original(self, request_id, [token]) for token in tokens)

    return accept_tokens


@_fix(
    target="vllm.v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats",
    relies_on=("vllm.v1.core.sched.scheduler:Scheduler.update_from_output",),
    why="vLLM counts no fewer drafts than it accepts",
    reason="With asynchronous scheduling it takes drafts that a grammar does not allow off the "
    "count of drafts. On Model Runner V1 those after the grammar's end are verified all the same, "
    "and accepted.",
    process="the engine core",
    upstream="not reported yet",
    remove_when="vLLM counts what is verified",
)
def _make_spec_decoding_stats(original: Any) -> Any:
    """Wrap it: a draft that was accepted was allowed.

    The step's numbers are corrected in place: `update_from_output` makes the request's own metrics
    of them next.
    """

    @functools.wraps(original)
    def make_spec_decoding_stats(
        self: Scheduler,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        if num_invalid_spec_tokens and request_id in num_invalid_spec_tokens:
            num_refused = num_draft_tokens - num_accepted_tokens
            num_invalid = min(num_invalid_spec_tokens[request_id], num_refused)
            num_invalid_spec_tokens[request_id] = num_invalid
        return original(
            self,
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    return make_spec_decoding_stats
