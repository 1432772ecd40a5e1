"""The hooks that have `min_p` and `logit_bias` hold for each token that a draft is verified by.

`vllm_fixes.FIXES` has them among all others; they know no speculative method.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from layerskip_vllm.hooks import install

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor
    from vllm.v1.sample.logits_processor.state import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

LOGITS_FIXES: list[install.Hook] = []

_fix = functools.partial(install.hook, LOGITS_FIXES)

_REJECTION = "vllm.v1.sample.rejection_sampler"


@_fix(
    target="vllm.sampling_params:SamplingParams._validate_spec_decode",
    why="`min_p` and `logit_bias` are not refused, also where `generation_config.json` sets one",
    reason="Model Runner V2 applies both to each token that it verifies, and the next three hooks "
    "have V1 do so. That is exact whatever the drafts are. With `min_p` in a checkpoint's "
    "`generation_config.json` vLLM would refuse every request that does not set it to 0.",
    process="the API server's, or that of `LLM`",
    upstream="not reported yet",
    remove_when="vLLM takes them with speculation",
)
def _validate_spec_decode(original: Any) -> Any:
    """Replace it: there is nothing else that it refuses."""

    def _validate_spec_decode(self: SamplingParams, speculative_config: Any) -> None:
        pass

    return _validate_spec_decode


@_fix(
    target="vllm.v1.worker.gpu_model_runner:build_logitsprocs",
    defined_in="vllm.v1.sample.logits_processor",
    relies_on=(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.may_reinitialize_input_batch",
        "vllm.v1.sample.logits_processor:BUILTIN_LOGITS_PROCESSORS",
    ),
    why="on Model Runner V1, `min_p` and `logit_bias` reach the sampler beside drafts",
    reason="With speculation vLLM builds what applies `min_tokens` alone.",
    process=install.V1_WORKER,
    remove_when="with the hook on `SamplingParams._validate_spec_decode`, or with V1",
)
def _build_logitsprocs(original: Any) -> Any:
    """Wrap it: with speculation, all that vLLM has of its own; custom ones it refuses itself."""

    @functools.wraps(original)
    def build_logitsprocs(
        vllm_config: VllmConfig,
        device: torch.device,
        is_pin_memory: bool,
        is_pooling_model: bool,
        custom_logitsprocs: Sequence[Any] = (),
    ) -> LogitsProcessors:
        from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

        if vllm_config.speculative_config and not is_pooling_model and not custom_logitsprocs:
            return LogitsProcessors(
                make(vllm_config, device, is_pin_memory) for make in BUILTIN_LOGITS_PROCESSORS
            )
        processors: LogitsProcessors = original(
            vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs
        )
        return processors

    return build_logitsprocs


@_fix(
    target=f"{_REJECTION}:RejectionSampler.apply_logits_processors",
    relies_on=("vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor",),
    why="on Model Runner V1, `logit_bias` holds for each token that is verified",
    reason="vLLM's processor adds it to one row a request, which is the token after a draft.",
    process=install.V1_WORKER,
    remove_when="with the hook on `SamplingParams._validate_spec_decode`, or with V1",
)
def _apply_logits_processors(original: Any) -> Any:
    """Wrap it: biases first, since penalties, which scale, come after them without drafts too."""

    @functools.wraps(original)
    def apply_logits_processors(
        self: RejectionSampler,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        metadata: SpecDecodeMetadata,
    ) -> torch.Tensor:
        from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor

        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor) and processor.biases:
                _add_biases(processor, logits, metadata.num_draft_tokens)
        processed: torch.Tensor = original(self, logits, sampling_metadata, metadata)
        return processed

    return apply_logits_processors


def _add_biases(
    processor: LogitBiasLogitsProcessor, logits: torch.Tensor, num_draft_tokens: Sequence[int]
) -> None:
    """Add a request's biases to the logits of all its drafts, [num_tokens, vocab_size], in place.

    Args:
        processor: Has the biases, by request and token.
        logits: Those of one request's drafts after another's.
        num_draft_tokens: By request.
    """
    import torch
    from vllm.utils.torch_utils import async_tensor_h2d

    ends = list(accumulate(num_draft_tokens))
    entries = [
        (row, token_id, bias)
        for index, biases in processor.biases.items()
        for row in range(ends[index] - num_draft_tokens[index], ends[index])
        for token_id, bias in biases.items()
    ]
    if not entries:
        return
    rows, token_ids, values = zip(*entries, strict=True)
    where = tuple(async_tensor_h2d([*ids], logits.device, torch.int64) for ids in (rows, token_ids))
    logits[where] += async_tensor_h2d([*values], logits.device, torch.float32)


@_fix(
    target=f"{_REJECTION}:apply_sampling_constraints",
    relies_on=(
        f"{_REJECTION}:expand_batch_to_tokens",
        "vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor",
    ),
    why="on Model Runner V1, `min_p` holds for each token that is verified",
    reason="vLLM's processor has one row a request. It comes between temperature and `top_p`.",
    process=install.V1_WORKER,
    remove_when="with the hook on `SamplingParams._validate_spec_decode`, or with V1",
)
def _apply_sampling_constraints(original: Any) -> Any:
    """Wrap it: a token goes whose probability at its request's temperature is too small.

    That is, less than `min_p` times the largest one: so far below the largest logit before the
    temperature has divided them.
    """

    @functools.wraps(original)
    def apply_sampling_constraints(
        logits: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> torch.Tensor:
        from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
        from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
                expanded = (cu_num_draft_tokens, logits.shape[0])
                # Greedy requests have a temperature of 0, and no `min_p`.
                given: Any = sampling_metadata.temperature
                temperature = expand_batch_to_tokens(given, *expanded, 0, 1)
                min_p = expand_batch_to_tokens(processor.min_p.squeeze(1), *expanded)
                least = logits.amax(-1) + temperature * min_p.log()
                logits.masked_fill_(logits < least.unsqueeze(-1), float("-inf"))
        constrained: torch.Tensor = original(logits, cu_num_draft_tokens, sampling_metadata)
        return constrained

    return apply_sampling_constraints
