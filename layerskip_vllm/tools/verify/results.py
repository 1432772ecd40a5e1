"""What one engine is asked, and what it said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ScoredCompletion:
    """A greedy completion.

    Attributes:
        token_ids: The tokens.
        logprobs: For each token the log probabilities of the likeliest tokens and its own, by id.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]


@dataclass(frozen=True)
class EngineJob:
    """What an engine is to do.

    Attributes:
        engine: The arguments of vLLM's `LLM`.
        prompts: The prompts.
        num_prompt_tokens: The tokens to which they are cut.
        is_reversed: Whether they come last first and in two halves, so that batches have other
            shapes.
        accepts_everything: Whether verification is taken out of Model Runner V1.
        max_tokens: Tokens of a greedy completion.
        num_samples: Samples of each prompt that is sampled from.
    """

    engine: Mapping[str, Any]
    prompts: Sequence[str]
    num_prompt_tokens: int
    is_reversed: bool
    accepts_everything: bool
    max_tokens: int
    num_samples: int


@dataclass(frozen=True)
class EngineOutput:
    """All that an engine gave.

    Attributes:
        runner: vLLM's model runner, `V1` or `V2`.
        device: Its name.
        dtype: The model's, such as `float32`.
        speculation: The speculative configuration in words, None for plain vLLM.
        num_speculative_tokens: K; 0 for plain vLLM.
        num_draft_tokens: Drafted in the greedy completions.
        num_accepted_tokens: Of these, accepted.
        greedy: By prompt.
        samples: By prompt that was sampled from: each sample's tokens.
    """

    runner: str
    device: str
    dtype: str
    speculation: str | None
    num_speculative_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    greedy: tuple[ScoredCompletion, ...]
    samples: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that was accepted; None without drafts."""
        if self.num_draft_tokens == 0:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens
