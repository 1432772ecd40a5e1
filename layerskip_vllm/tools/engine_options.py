"""What `verify`, `bench` and `tune` are told of their engines, and the processes of these."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.config.flags import check_length
from layerskip_vllm.tools.command_line import Option
from layerskip_vllm.tools.engine_process import EngineProcess
from layerskip_vllm.tools.float32 import float32_env
from layerskip_vllm.tools.hardware import list_gpu_names

_NUM_LOG_LINES = 3
# Of the memory, where two engines are there at once.
SHARE_OF_MEMORY = 0.45


class EngineSettings(Settings):
    """How engines run."""

    # What the command sets itself, each run its own.
    reserved: ClassVar[tuple[str, ...]] = (
        "model",
        "speculative_config",
        "seed",
        "dtype",
        "tensor_parallel_size",
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


class EngineOptions(EngineSettings):
    """How engines draft and run."""

    exit_layer: Annotated[int | None, Option(metavar="E")] = Field(
        default=None, description="the layers that draft; the checkpoint's own when not given"
    )
    num_speculative_tokens: Annotated[str | None, Option(metavar="K")] = Field(
        default=None,
        description="the tokens drafted for each step, or `auto`, or `auto:N` with the most; the "
        "checkpoint's own when not given",
    )

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.num_speculative_tokens is not None:
            check_length(_read_length(self.num_speculative_tokens))
        return self

    def join_speculative_settings(self) -> dict[str, Any]:
        """Join `--speculative-config` and the options beside it, each setting said once."""
        length = self.num_speculative_tokens
        options = {
            "exit_layer": self.exit_layer,
            "num_speculative_tokens": None if length is None else _read_length(length),
        }
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name in self.speculative:
                raise ValueError(
                    f"--{name.replace('_', '-')} and --speculative-config[{name!r}] are mutually "
                    "exclusive; leave one out."
                )
        return {**self.speculative, **given}


def _read_length(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def list_engine_variables() -> dict[str, str]:
    """Return the variables of an engine whose speed is measured.

    On a GPU it runs as `LLM` does by default, since in one process plain vLLM starves. On a CPU
    vLLM would leave one thread to an engine in its caller's process.
    """
    if list_gpu_names():
        return {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": threads}


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
