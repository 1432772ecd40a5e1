"""What a synthetic checkpoint shall be, and random prompts for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from dataclasses import dataclass

# Checkpoints of another recipe are not reused: raise it when what is written changes.
RECIPE = 2
NUM_CALIBRATION_PROMPTS = 16
NUM_PROMPT_TOKENS = 16


def make_prompts(vocab_size: int, num_prompts: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Return prompts of random token ids, the same for the same arguments."""
    source = random.Random(seed)
    return [
        [source.randrange(2, vocab_size) for _ in range(num_tokens)] for _ in range(num_prompts)
    ]


@dataclass(frozen=True)
class SyntheticSpec:
    """What a synthetic checkpoint shall be.

    Attributes:
        num_layers: L, all layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward network.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab_size: Tokens; the LM head is not tied to the embedding.
        exit_layer: E, the number of layers that draft.
        num_speculative_tokens: K, the tokens in a draft.
        acceptance: Accepted drafts by drafted tokens to reach under greedy decoding. The paper's
            summaries and code have 55 to 78 %.
        seed: Of the weights.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    exit_layer: int
    num_speculative_tokens: int = 4
    acceptance: float = 0.72
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if not 1 <= self.exit_layer < self.num_layers:
            raise ValueError(
                f"exit_layer is {self.exit_layer} of {self.num_layers} layers; it must be between "
                f"1 and {self.num_layers - 1}, so that some layers are left to disagree."
            )
        if not 0 < self.acceptance < 1:
            raise ValueError(
                f"acceptance is {self.acceptance}; it must be between 0 and 1, such as 0.72."
            )
        if self.num_speculative_tokens < 1:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}; it must be at least 1."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, "
                f"{self.num_kv_heads}."
            )

    def name(self) -> str:
        """Return the folder's name: the shape in words and a digest of all of it."""
        told = json.dumps([RECIPE, dataclasses.asdict(self)], sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        return f"llama-{self.num_layers}x{self.hidden_size}-exit{self.exit_layer}-{digest}"

    def calibration_prompts(self) -> list[list[int]]:
        """Return the prompts that the acceptance is measured with."""
        return make_prompts(self.vocab_size, NUM_CALIBRATION_PROMPTS, NUM_PROMPT_TOKENS, self.seed)


PRESETS = {
    "tiny": SyntheticSpec(4, 256, 512, 4, 2, 64, 1024, exit_layer=1),
    # Its head is 0.47 layers, a share of the whole like that of Llama 2 7B.
    "cpu-0.6b": SyntheticSpec(16, 2048, 4096, 16, 4, 128, 8192, exit_layer=4),
    # The shapes of Llama 3.2 1B (there the head is tied, which a step's reading does not show)
    # and Llama 3 8B.
    "gpu-1b": SyntheticSpec(16, 2048, 8192, 32, 8, 64, 128256, exit_layer=4),
    "gpu-8b": SyntheticSpec(32, 4096, 14336, 32, 8, 128, 128256, exit_layer=8),
}
