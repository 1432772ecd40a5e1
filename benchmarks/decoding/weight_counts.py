"""How many weights a Llama-architecture model has, and how many a step of it reads.

Called by `benchmarks.decoding.speedup` for the bound beside what it measures. Of an embedding a
step reads single rows, of the KV cache (short texts) and the activations next to nothing: none of
them counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerskip_vllm.checkpoint.weight_shares import WeightShares


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
        """Count what one draft step reads: the first E layers and the head."""
        return exit_layer * self.layer + self.head

    def shares(self, exit_layer: int) -> WeightShares:
        """Return what a draft step reads, as parts of what a step of the whole model reads.

        Args:
            exit_layer: E, the number of layers that draft.

        Returns:
            The shares.

        Raises:
            ValueError: If `exit_layer` is not one of the model's layers.
        """
        if not 1 <= exit_layer <= self.num_layers:
            raise ValueError(
                f"exit_layer is {exit_layer}, but the model has {self.num_layers} layers; "
                f"it must be between 1 and {self.num_layers}."
            )
        return WeightShares.from_sizes([self.layer] * self.num_layers, self.head, exit_layer)


def count_weights(config: Mapping[str, Any]) -> WeightCounts:
    """Count the weights of a Llama-architecture model without biases.

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
