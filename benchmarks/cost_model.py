"""What self-speculative decoding can gain at best when reading the weights is all that costs.

Pure functions; `benchmarks.speedup` prints their figures beside what it measures. Of an embedding
a step reads single rows, of the KV cache (short texts) and the activations next to nothing: none
of them counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WeightCounts:
    """Weights of a Llama-architecture model, counted.

    Attributes:
        layer: Weights of one transformer layer, its two norms included.
        head: Weights of the final norm and the LM head, which every exit reads.
        embedding: Weights of the token embedding; 0 if it is the LM head.
        num_layers: L, all of the model's layers.
    """

    layer: int
    head: int
    embedding: int
    num_layers: int

    @property
    def whole(self) -> int:
        """Weights that one step of the whole model reads: all layers and the head."""
        return self.num_layers * self.layer + self.head

    @property
    def total(self) -> int:
        """All of the model's weights."""
        return self.whole + self.embedding

    def read_by_draft(self, exit_layer: int) -> int:
        """Counts what one draft step reads: the first E layers and the head.

        Args:
            exit_layer: E, the number of layers that draft.

        Returns:
            The number of weights.

        Raises:
            ValueError: If `exit_layer` is not one of the model's layers.
        """
        if not 1 <= exit_layer <= self.num_layers:
            raise ValueError(
                f"exit_layer is {exit_layer}, but the model has {self.num_layers} layers; "
                f"it must be between 1 and {self.num_layers}."
            )
        return exit_layer * self.layer + self.head


def count_weights(config: Mapping[str, Any]) -> WeightCounts:
    """Counts the weights of a Llama-architecture model without biases.

    Args:
        config: The model's `config.json`.

    Returns:
        The counts. Times two they are bytes in bfloat16.
    """
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or hidden // num_heads
    attention = 2 * hidden * num_heads * head_dim + 2 * hidden * num_kv_heads * head_dim
    feed_forward = 3 * hidden * config["intermediate_size"]
    return WeightCounts(
        layer=attention + feed_forward + 2 * hidden,
        head=vocab * hidden + hidden,
        embedding=0 if config.get("tie_word_embeddings") else vocab * hidden,
        num_layers=config["num_hidden_layers"],
    )


def cost_of_round(counts: WeightCounts, exit_layer: int, num_speculative_tokens: int) -> float:
    """Returns what one draft-and-verify round reads, in steps of the whole model.

    A round is K draft steps, each through the prefix (the first E layers) and the head, and one
    step of the whole model: (K * (prefix + head) + whole) / whole.

    Args:
        counts: The model's weights.
        exit_layer: E, the number of layers that draft.
        num_speculative_tokens: K, the tokens in a draft.

    Returns:
        The cost; a plain step costs 1.

    Raises:
        ValueError: If `num_speculative_tokens` is below 1, or `exit_layer` is not a layer.
    """
    if num_speculative_tokens < 1:
        raise ValueError(
            f"num_speculative_tokens is {num_speculative_tokens}; it must be at least 1."
        )
    draft = counts.read_by_draft(exit_layer)
    return (num_speculative_tokens * draft + counts.whole) / counts.whole


def bound_speedup(
    counts: WeightCounts, exit_layer: int, num_speculative_tokens: int, accepted: float
) -> float:
    """Returns how many times faster than plain decoding the weights read allow.

    A round yields the accepted drafts and one token of the whole model, so the bound is
    (accepted + 1) / (K * (prefix + head) + whole), where the whole model counts as 1. It holds
    where reading weights is what a step costs: batch 1, nearly. In larger batches a plain step
    shares one reading between its requests too, so the bound stays what it is, and compute, which
    verifying multiplies by K + 1, comes on top.

    Args:
        counts: The model's weights.
        exit_layer: E, the number of layers that draft.
        num_speculative_tokens: K, the tokens in a draft.
        accepted: The mean number of drafts accepted in a round, 0 to K.

    Returns:
        The bound, in times plain decoding.

    Raises:
        ValueError: If a round cannot accept that many drafts, or another number is out of range.
    """
    cost = cost_of_round(counts, exit_layer, num_speculative_tokens)
    if not 0 <= accepted <= num_speculative_tokens:
        raise ValueError(
            f"accepted is {accepted}; a round of {num_speculative_tokens} drafts accepts "
            f"between 0 and {num_speculative_tokens}."
        )
    return (accepted + 1) / cost
