"""What one engine is asked, and what it said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ScoredCompletion:
    """A greedy completion."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]  # by token, of the likeliest ids and its own


@dataclass(frozen=True)
class EngineJob:
    """What an engine is to do."""

    engine: Mapping[str, Any]  # arguments of vLLM's `LLM`
    prompts: Sequence[str]
    num_prompt_tokens: int  # to which they are cut
    is_reversed: bool  # last first and in two halves: batches of other shapes
    accepts_everything: bool  # verification is taken out of Model Runner V1
    max_tokens: int  # of a greedy completion
    num_samples: int  # of each prompt that is sampled from


@dataclass(frozen=True)
class EngineOutput:
    """All that an engine gave."""

    runner: str  # V1 or V2
    device: str
    dtype: str  # such as float32
    speculation: str | None  # in words; None for plain vLLM
    num_speculative_tokens: int  # K; 0 for plain vLLM
    num_draft_tokens: int  # in the greedy completions
    num_accepted_tokens: int  # of these
    greedy: tuple[ScoredCompletion, ...]  # by prompt
    samples: tuple[tuple[tuple[int, ...], ...], ...]  # by prompt, by sample

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that was accepted; None without drafts."""
        if self.num_draft_tokens == 0:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens
