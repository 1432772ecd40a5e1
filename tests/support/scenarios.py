"""What a test asks of an engine, and what it gets back; plain data that crosses a pipe."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.support.checkpoints import VOCAB_SIZE

GREEDY: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


def tokens(length: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> tuple[int, ...]:
    """A random prompt without special tokens."""
    generator = random.Random(f"{length} {seed}")
    return tuple(generator.randrange(2, vocab_size) for _ in range(length))


@dataclass(frozen=True)
class Request:
    """One prompt, when it joins, and when it leaves early.

    Attributes:
        prompt: Token ids.
        params: Arguments of vLLM's `SamplingParams`, over `GREEDY`.
        joins_at: The engine step of its phase before which it is added.
        aborts_after: The number of output tokens after which its client goes away.
        phase: Phases run one after the other; each waits until the one before has finished.
        priority: For `scheduling_policy="priority"`; lower is served first.
        adapter: The folder of a LoRA adapter; None for the model alone.
        as_embeddings: Whether the prompt is given as the model's embeddings of its tokens.
        turns: Prompts that come after, in one session with streamed input. The first of them is
            there at once, each other one when the turn before it has ended.
        unchecked: `extra_args` that the engine core is given behind the back of all checks.
    """

    prompt: tuple[int, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    joins_at: int = 0
    aborts_after: int | None = None
    phase: int = 0
    priority: int = 0
    adapter: str | None = None
    as_embeddings: bool = False
    turns: tuple[tuple[int, ...], ...] = ()
    unchecked: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Scenario:
    """An engine and the requests that it serves.

    Attributes:
        model: The checkpoint's folder.
        requests: In the order of their ids.
        speculative: vLLM's `speculative_config`; None for plain vLLM.
        engine: More arguments of vLLM's `LLM`.
        is_async: Whether to schedule asynchronously, which vLLM never does on the CPU; if None,
            drafts do on Model Runner V2, as on GPUs.
        lengths: What K "auto" is at each step, again and again, in the place of what pays.
    """

    model: str
    requests: tuple[Request, ...]
    speculative: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    is_async: bool | None = None
    lengths: tuple[int, ...] = ()

    def plain(self) -> Scenario:
        """The same without speculation, and without what is only understood with it."""
        engine = {k: v for k, v in self.engine.items() if k != "per_request_spec_decode_metrics"}
        requests = tuple(
            replace(
                r,
                params={k: v for k, v in r.params.items() if k != "extra_args"},
                unchecked=None,
            )
            for r in self.requests
        )
        return replace(
            self,
            requests=requests,
            speculative=None,
            engine=engine,
            is_async=False,
            lengths=(),
        )


def layerskip(exit_layer: int, num_speculative_tokens: int, **settings: Any) -> dict[str, Any]:
    """A `speculative_config`."""
    return {
        "method": "layerskip",
        "exit_layer": exit_layer,
        "num_speculative_tokens": num_speculative_tokens,
        **settings,
    }


@dataclass(frozen=True)
class Completion:
    """One of a request's `n` outputs.

    Attributes:
        logprobs: For each output token, log probability by token id.
        spec_decode: vLLM's per-request metrics, as a dictionary.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: tuple[Mapping[int, float], ...] | None
    spec_decode: Mapping[str, Any] | None


@dataclass(frozen=True)
class Output:
    """A request's result.

    Attributes:
        prompt_logprobs: For each prompt token but the first, log probability by token id.
        num_cached_tokens: How much of the prompt came from the prefix cache.
    """

    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[Mapping[int, float] | None, ...] | None
    num_cached_tokens: int | None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of the only completion."""
        (completion,) = self.completions
        return completion.token_ids


@dataclass(frozen=True)
class Step:
    """What one engine step ran.

    Attributes:
        num_mid_prompt: Requests whose prompt did not end in this step.
        num_drafts: Requests with drafts to verify.
        num_padded: Requests with drafts before their prompt's last token has run: placeholders
            (-1), as vLLM gives to prompts that are cached but for one token.
        draft_lens: The number of drafts of each request that had some.
        num_to_draft: How many tokens the drafter was told to draft at the end of the step.
    """

    num_requests: int
    num_tokens: int
    num_mid_prompt: int
    num_drafts: int
    num_padded: int
    draft_lens: tuple[int, ...]
    num_to_draft: int


@dataclass(frozen=True)
class Report:
    """All that an engine did in a scenario.

    Attributes:
        outputs: By request, in the scenario's order; None for a request that was aborted.
        aborted_token_ids: What aborted requests had produced, by request.
        num_accepted_per_pos: Accepted drafts by position in the draft.
        num_blocks: KV cache blocks.
        layers_by_group: The layers of each KV cache group.
        drafter: The drafter's class name, None without speculation.
    """

    outputs: tuple[Output | None, ...] = field(repr=False)
    aborted_token_ids: Mapping[int, tuple[int, ...]]
    steps: tuple[Step, ...] = field(repr=False)
    num_drafts: int
    num_draft_tokens: int
    num_accepted: int
    num_accepted_per_pos: tuple[int, ...]
    num_preemptions: int
    num_blocks: int
    layers_by_group: tuple[tuple[str, ...], ...] = field(repr=False)
    drafter: str | None
    runner: str
    is_async: bool

    @property
    def token_ids(self) -> list[list[tuple[int, ...]] | None]:
        """For each request the tokens of its completions."""
        return [
            None if output is None else [c.token_ids for c in output.completions]
            for output in self.outputs
        ]

    @property
    def acceptance(self) -> float:
        """The share of draft tokens that were accepted."""
        return self.num_accepted / self.num_draft_tokens

    @property
    def counts(self) -> tuple[int, int, int, tuple[int, ...]]:
        """Drafts, draft tokens, accepted tokens, accepted tokens by position."""
        return (
            self.num_drafts,
            self.num_draft_tokens,
            self.num_accepted,
            self.num_accepted_per_pos,
        )
