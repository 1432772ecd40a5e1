"""What `layerskip-vllm verify` is asked to do: options of its command line."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.tools.command_line import Option

# `verify` sets these itself, each run its own.
_RESERVED = ("model", "speculative_config", "seed", "dtype", "tensor_parallel_size")


class VerifyConfig(Settings):
    """The engines to compare and what to ask of them."""

    model: Annotated[str, Option(metavar="MODEL", is_positional=True)] = Field(
        description="a checkpoint's folder or name"
    )
    speculative: Annotated[dict[str, Any], Option(flag="--speculative-config")] = Field(
        default={},
        description="more of vLLM's speculative settings, such as "
        '\'{"draft_sample_method": "probabilistic"}\'',
    )
    dtype: Annotated[str, Option(metavar="DTYPE")] = Field(
        default="auto",
        description="of all runs: float32 is the strictest, auto the checkpoint's own",
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs of an engine")
    engine: Annotated[dict[str, Any], Option(flag="--engine-args")] = Field(
        default={},
        description="more arguments of vLLM's LLM for all runs, such as "
        "'{\"max_model_len\": 4096}'",
    )
    num_prompts: int = Field(
        default=16,
        ge=1,
        description="prompts to complete greedily, the first four of which are sampled from too",
    )
    num_prompt_tokens: int = Field(default=64, ge=1, description="most tokens of a prompt")
    max_tokens: int = Field(default=64, ge=1, description="tokens of a greedy completion")
    num_samples: int = Field(
        default=400,
        ge=100,  # fewer say nothing of a distribution
        description="samples of each prompt that is sampled from",
    )

    @model_validator(mode="after")
    def _check_settings_of_vllm(self) -> Self:
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
        return self
