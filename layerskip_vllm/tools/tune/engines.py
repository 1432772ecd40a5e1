"""The engines of `layerskip-vllm tune`: the parent's side of each process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip_vllm.tools.engine_options import (
    SHARE_OF_MEMORY,
    list_engine_variables,
    make_engine_process,
    say_why_it_failed,
)
from layerskip_vllm.tools.engine_process import EngineProcess, JobError
from layerskip_vllm.tools.tune.engine_run import TunedEngine

_JOBS = "layerskip_vllm.tools.tune.engine_run"


class TimedEngine:
    """An engine in a process of its own."""

    def __init__(self, process: EngineProcess, engine: Mapping[str, Any]) -> None:
        """Start it; a ValueError says that it failed, with the end of its log."""
        self._process = process
        arguments = {"gpu_memory_utilization": SHARE_OF_MEMORY, **engine}
        self.about: TunedEngine = self._call("load_engine", arguments)

    def time_steps(
        self, prompts: Sequence[list[int]], num_drafts: int | None, seconds: float
    ) -> float:
        """Return what a step takes that decodes for all prompts, in seconds."""
        step_s: float = self._call("time_decoding", prompts, num_drafts, seconds)
        return step_s

    def decode(
        self, prompts: Sequence[list[int]], max_tokens: int, num_drafts: int | None = None
    ) -> float:
        """Decode a batch to its full length; return its tokens a second, prompts left out."""
        tokens_per_s: float = self._call("decode", prompts, max_tokens, num_drafts)
        return tokens_per_s

    def _call(self, job: str, *args: Any) -> Any:
        try:
            return self._process.run(f"{_JOBS}:{job}", *args)
        except JobError as error:
            raise ValueError(say_why_it_failed(self._process)) from error


@contextlib.contextmanager
def open_engine(name: str, engine: Mapping[str, Any], folder: Path) -> Iterator[TimedEngine]:
    """Start an engine, its log in `folder`, and end it whatever happens."""
    variables = list_engine_variables()
    with make_engine_process(name, folder, engine["dtype"], **variables) as process:
        yield TimedEngine(process, engine)
