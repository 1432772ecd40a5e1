"""What one engine said, as `engine_run` wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Completion:
    """A greedy completion.

    Attributes:
        token_ids: The tokens.
        logprobs: For each token the log probabilities of the likeliest tokens and its own, by id.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...]


@dataclass(frozen=True)
class Result:
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
    greedy: tuple[Completion, ...]
    samples: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that was accepted; None without drafts."""
        if self.num_draft_tokens == 0:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens


def read_result(path: Path) -> Result:
    """Read what `engine_run` wrote.

    Args:
        path: The file.

    Returns:
        What the engine gave.
    """
    fields = json.loads(path.read_text())
    greedy = tuple(
        Completion(
            tuple(completion["token_ids"]),
            tuple(
                {int(token_id): logprob for token_id, logprob in position.items()}
                for position in completion["logprobs"]
            ),
        )
        for completion in fields.pop("greedy")
    )
    samples = tuple(tuple(map(tuple, sample)) for sample in fields.pop("samples"))
    return Result(**fields, greedy=greedy, samples=samples)
