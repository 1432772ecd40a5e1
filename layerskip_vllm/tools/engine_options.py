"""What `verify` and `bench` are told of their engines, and the processes of these."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.config.flags import is_auto
from layerskip_vllm.tools.command_line import Option
from layerskip_vllm.tools.engine_process import EngineProcess
from layerskip_vllm.tools.float32 import float32_env

_NUM_LOG_LINES = 3


class EngineOptions(Settings):
    """How engines draft and run."""

    # What the command sets itself, each run its own.
    reserved: ClassVar[tuple[str, ...]] = (
        "model",
        "speculative_config",
        "seed",
        "dtype",
        "tensor_parallel_size",
    )

    exit_layer: Annotated[int | None, Option(metavar="E")] = Field(
        default=None, description="the layers that draft; the checkpoint's own when not given"
    )
    num_speculative_tokens: Annotated[str | None, Option(metavar="K")] = Field(
        default=None,
        description="the tokens drafted for each step, or `auto`, or `auto:N` with the most; the "
        "checkpoint's own when not given",
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

    @model_validator(mode="after")
    def _check_settings_of_vllm(self) -> Self:
        length = self.num_speculative_tokens
        if length is not None and not (length.isdecimal() or is_auto(length)):
            raise ValueError(
                f"num_speculative_tokens is {length!r}; it must be an integer of at least 1, "
                "'auto', or 'auto:8', whose 8 is the most that a step drafts."
            )
        for name in self.reserved:
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

    def join_speculative_settings(self) -> dict[str, Any]:
        """Join `--speculative-config` and the options beside it, each setting said once."""
        length = self.num_speculative_tokens
        options = {
            "exit_layer": self.exit_layer,
            "num_speculative_tokens": int(length) if length and length.isdecimal() else length,
        }
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name in self.speculative:
                raise ValueError(
                    f"--{name.replace('_', '-')} and --speculative-config[{name!r}] are mutually "
                    "exclusive; leave one out."
                )
        return {**self.speculative, **given}


def make_engine_process(name: str, folder: Path, dtype: str, **variables: str) -> EngineProcess:
    """Prepare an engine's process, with its log in `folder` and `variables` in its environment."""
    env = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        **float32_env(dtype),
        **variables,
    }
    return EngineProcess(name, folder / f"{name}.log", env)


def say_why_it_failed(process: EngineProcess) -> str:
    """Say in which run an engine failed, with the end of its log."""
    end = "\n  ".join(process.log.strip().splitlines()[-_NUM_LOG_LINES:])
    return f"the {process.name} run failed; {process.log_path} ends:\n  {end}"
