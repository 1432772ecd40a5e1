"""What `layerskip-vllm verify` is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layerskip_vllm.checkpoint.checks import check_positive_int

MIN_NUM_SAMPLES = 100
# `verify` sets these itself, each run its own.
_RESERVED = ("model", "speculative_config", "seed", "dtype", "tensor_parallel_size")


@dataclass(frozen=True)
class VerifyConfig:
    """The engines to compare and what to ask of them.

    Attributes:
        model: A checkpoint's folder or name.
        speculative: vLLM's `speculative_config`, without `method`.
        dtype: The dtype of all runs; `auto` is the checkpoint's own.
        tensor_parallel_size: The devices of an engine.
        engine: More arguments of vLLM's `LLM`.
        num_prompts: Prompts to complete greedily; the first of them are sampled from too.
        num_prompt_tokens: The most tokens of a prompt.
        max_tokens: Tokens of a greedy completion.
        num_samples: Completions to sample from each prompt that is sampled from.
    """

    model: str
    speculative: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)
    num_prompts: int = 16
    num_prompt_tokens: int = 64
    max_tokens: int = 64
    num_samples: int = 400

    def __post_init__(self) -> None:
        for name in (
            *("tensor_parallel_size", "num_prompts", "num_prompt_tokens"),
            *("max_tokens", "num_samples"),
        ):
            check_positive_int(name, getattr(self, name))
        if self.num_samples < MIN_NUM_SAMPLES:
            raise ValueError(
                f"num_samples is {self.num_samples}; it must be at least {MIN_NUM_SAMPLES}, for "
                "the test on distributions to mean anything."
            )
        for name in _RESERVED:
            if name in self.engine:
                raise ValueError(
                    f"engine_args has {name!r}, which is set for each run; leave it out"
                    + (", or use its option." if name != "seed" else ".")
                )
        if "method" in self.speculative:
            raise ValueError(
                f"speculative_config has method {self.speculative['method']!r}; leave it out, it "
                "is layerskip."
            )
