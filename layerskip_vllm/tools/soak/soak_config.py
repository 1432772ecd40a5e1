"""How `layerskip-vllm soak` treats a server: options of its command line."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.tools.command_line import Option


class SoakConfig(Settings):
    """How much traffic of which kinds is sent, and what counts as wrong."""

    minutes: Annotated[float, Option(metavar="M")] = Field(
        default=30.0, gt=0, description="how long to send requests"
    )
    num_requests: Annotated[int | None, Option(flag="--requests")] = Field(
        default=None, ge=1, description="stop after so many requests"
    )
    kinds: Annotated[tuple[str, ...], Option(metavar="KIND")] = Field(
        default=(), description="send these kinds alone; all when not given"
    )
    concurrency: int = Field(default=16, ge=1, description="requests open at once")
    num_questions: Annotated[int, Option(flag="--questions")] = Field(
        default=200, ge=10, description="different greedy ones"
    )
    seed: int = Field(default=0, description="of questions and traffic")
    timeout_s: Annotated[float, Option(flag="--timeout", metavar="S")] = Field(
        default=300.0, gt=0, description="seconds for a request"
    )
    max_faults: int = Field(default=100, ge=1, description="stop after so many faults")
    pid: Annotated[int | None, Option(metavar="PID")] = Field(
        default=None, description="the server's process, if it is here, to watch its memory"
    )
    max_growth_mib: Annotated[float, Option(metavar="MIB")] = Field(
        default=64.0, gt=0, description="how much its memory may grow once warm"
    )
    interval_s: Annotated[float, Option(flag="--interval", metavar="S")] = Field(
        default=5.0, gt=0, description="seconds between looks at the server"
    )

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        if not self.kinds:
            return self
        from layerskip_vllm.tools.soak.traffic import KINDS

        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds has {kind!r}; it can have {', '.join(KINDS)}.")
        return self
