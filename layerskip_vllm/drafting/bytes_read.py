"""What a step reads of a model's weights: the cost model of drafting at small batch sizes."""

from __future__ import annotations

from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from layerskip_vllm.checkpoint.weight_shares import WeightShares
from layerskip_vllm.drafting.draft_head import DraftHead
from layerskip_vllm.drafting.stages import find_sliceable_model, layers_of


def share_of_bytes(
    target: nn.Module,
    exit_layer: int,
    exit_adapter: nn.Module | None = None,
    draft_head: DraftHead | None = None,
) -> WeightShares:
    """Add up the bytes that a draft step reads of a model on this rank.

    Args:
        target: The whole model, as vLLM loaded it.
        exit_layer: E, the number of layers that draft.
        exit_adapter: What a draft step reads besides the model, None for nothing.
        draft_head: What it reads in the place of the model's head, None for that.

    Returns:
        The shares.
    """
    layers = [num_bytes(layer) for layer in layers_of(find_sliceable_model(target))]
    embeddings = [m for m in target.modules() if isinstance(m, VocabParallelEmbedding)]
    heads = [m for m in embeddings if isinstance(m, ParallelLMHead)]
    # Without a head of its own the model unembeds with its embedding.
    head = sum(num_bytes(module) for module in heads or embeddings)
    adapter = sum(weight.nbytes for weight in exit_adapter.buffers()) if exit_adapter else 0
    shares = WeightShares.from_sizes(layers, head, exit_layer, adapter)
    if draft_head is None:
        return shares
    return shares.with_draft_vocab(num_bytes(draft_head.head) / head)


def num_bytes(module: nn.Module) -> int:
    """Return the size of a module's weights in bytes on this rank."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    for linear in module.modules():
        # On the CPU vLLM repacks the weights of linear layers and leaves an empty parameter.
        weight = getattr(linear, "weight", None)
        if isinstance(linear, LinearBase) and weight is not None and weight.numel() == 0:
            # A replicated linear layer has no sizes per partition.
            num_inputs = getattr(linear, "input_size_per_partition", linear.input_size)
            num_outputs = getattr(linear, "output_size_per_partition", linear.output_size)
            size += num_inputs * num_outputs * linear.params_dtype.itemsize
    return size
