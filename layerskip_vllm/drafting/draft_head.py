"""A head of few rows: those of the target's head that belong to the tokens drafts choose among.

Made in the worker after loading, where there is a `draft_vocab`. A row is copied, not shared, so it
is copied anew, to where it was, when the target's weights change.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from layerskip_vllm.checkpoint.draft_vocab import read_draft_vocab
from layerskip_vllm.drafting.stages import put_in_place

NUM_TRIED_STATES = 4


class DraftHead(nn.Module):
    """Computes the target's logits of the draft vocabulary alone.

    The target's own `compute_logits` does, run on a shallow copy that has a head of these rows in
    the place of its head: scale, soft cap, bias and the gathering from tensor-parallel ranks are
    the target's, and each rank has an equal part of the rows.

    Attributes:
        token_ids: `[num_draft_tokens] int64`, the draft vocabulary; a buffer, which vLLM keeps
            through sleep of level 2.
        head: The rows, in the order of `token_ids`, divided over the ranks.
        target_head: The target's, which they are copied from.
        headed_target: The target with `head` in the place of its own; it shares all else.
        vocab_size: The number of logits that the target computes.
        is_stale: Whether the target's weights have changed since the rows were copied.
    """

    token_ids: torch.Tensor
    head: ParallelLMHead
    target_head: VocabParallelEmbedding
    headed_target: Any
    vocab_size: int
    is_stale: bool

    def __init__(self, target: Any, file: str, vllm_config: VllmConfig):
        """Copy the rows of a loaded model's head.

        Args:
            target: The whole model.
            file: The draft vocabulary's.
            vllm_config: The configuration that the model was built with.

        Raises:
            ValueError: If the file is not (on this machine) what it should be, or the model's
                logits are not those of an unquantized head.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # the same states on all ranks
        hidden_size = vllm_config.model_config.get_hidden_size()
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        states = torch.randn(NUM_TRIED_STATES, hidden_size, generator=generator)
        states = states.to(vllm_config.device_config.device, dtype)
        processor, head, logits = _compute_watched(target, states)
        token_ids = torch.tensor(read_draft_vocab(Path(file)).token_ids, device=states.device)
        self.register_buffer("token_ids", token_ids)
        self.vocab_size = logits.shape[-1]
        with set_current_vllm_config(vllm_config), states.device:
            self.head = ParallelLMHead(
                len(token_ids),
                head.embedding_dim,
                bias=getattr(head, "bias", None) is not None,
                params_dtype=head.params_dtype,
                padding_size=math.lcm(head.padding_size, head.tp_size),
                disable_tp=head.disable_tp,
            )
        # Past `nn.Module.__setattr__`, which would register the target's parameters here.
        self.__dict__["target_head"] = head
        self.__dict__["headed_target"] = put_in_place(
            {head: self.head, processor: _processor_of(processor, len(token_ids))}, target
        )
        self.is_stale = True
        self.refresh()
        self._check(states, logits)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute `[num_tokens, num_draft_tokens]` of `[num_tokens, hidden_size]`."""
        logits: torch.Tensor = self.headed_target.compute_logits(hidden_states)
        return logits

    def widen(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """Lay values of the draft vocabulary out over the target's.

        Args:
            values: `[num_tokens, num_draft_tokens]`, logits or probabilities.
            fill: The value of every other token.

        Returns:
            `[num_tokens, vocab_size]`.
        """
        wide = values.new_full((len(values), self.vocab_size), fill)
        return wide.index_copy_(1, self.token_ids, values)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the rows anew if they are stale, in place: CUDA graphs have their address."""
        if not self.is_stale:
            return
        for name, parameter in self.head.named_parameters():
            self.head.weight_loader(parameter, self._gather(getattr(self.target_head, name)))
        self.head.quant_method.process_weights_after_loading(self.head)
        self.is_stale = False

    def _gather(self, weights: torch.Tensor) -> torch.Tensor:
        """Gather the draft vocabulary's rows of the target's head, or of its bias, on each rank."""
        shard = self.target_head.shard_indices
        start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        is_here = (self.token_ids >= start) & (self.token_ids < end)
        rows = weights[torch.where(is_here, self.token_ids - start, 0)]
        rows[~is_here] = 0
        if self.target_head.tp_size > 1:
            rows = tensor_model_parallel_all_reduce(rows)
        return rows

    def _check(self, states: torch.Tensor, logits: torch.Tensor) -> None:
        """Refuse a model whose logits are not a row of its head each."""
        expected = logits[:, self.token_ids].float()
        tolerance = torch.finfo(states.dtype).eps ** 0.5 * expected.abs().max().item()
        found = self.compute_logits(states).float()
        if not torch.allclose(found, expected, rtol=0, atol=tolerance):
            _refuse(self.headed_target, "does more to its logits than its head and scale")


def _compute_watched(
    target: Any, states: torch.Tensor
) -> tuple[LogitsProcessor, VocabParallelEmbedding, torch.Tensor]:
    """Compute logits, and see by which logits processor and which head the model does."""
    calls: list[tuple[Any, Any]] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: calls.append((module, args[0])))
        for module in target.modules()
        if isinstance(module, LogitsProcessor)
    ]
    with torch.no_grad():
        logits = target.compute_logits(states)
    for handle in handles:
        handle.remove()
    if len(calls) != 1:
        _refuse(target, f"computes its logits by {len(calls)} calls of vLLM's LogitsProcessor")
    ((processor, head),) = calls
    method = getattr(head, "quant_method", None)
    is_plain = isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
    weight = getattr(head, "weight", torch.empty(0))  # none is left where vLLM has repacked it
    if not (isinstance(head, VocabParallelEmbedding) and is_plain and weight.numel() > 0):
        _refuse(target, f"has a quantized or repacked head ({type(method).__name__})")
    return processor, head, logits


def _refuse(target: nn.Module, reason: str) -> None:
    raise ValueError(
        f"draft_vocab is set, but {type(target).__name__} {reason}, of which layerskip cannot take "
        "some rows; leave draft_vocab out."
    )


def _processor_of(processor: LogitsProcessor, vocab_size: int) -> LogitsProcessor:
    """Copy a logits processor for another number of tokens."""
    copied = copy.copy(processor)
    copied.vocab_size = copied.org_vocab_size = vocab_size
    return copied
