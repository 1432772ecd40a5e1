"""Plain vLLM and layerskip on the same prompts, in turns, each engine in its own process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from layerskip_vllm.tools.bench.engine_run import EngineFacts, TaskRound
from layerskip_vllm.tools.bench.samples import TaskSample
from layerskip_vllm.tools.engine_options import (
    SHARE_OF_MEMORY,
    list_engine_variables,
    make_engine_process,
    say_why_it_failed,
)
from layerskip_vllm.tools.engine_process import EngineProcess, JobError

PLAIN, LAYERSKIP = RUNS = ("plain", "layerskip")
_JOBS = "layerskip_vllm.tools.bench.engine_run"
_NUM_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class TaskRun:
    """What one engine did in all its rounds.

    The paper's measures are means over rounds: with one request a round they are over requests.
    """

    facts: EngineFacts
    rounds: tuple[TaskRound, ...]

    @property
    def texts(self) -> list[str]:
        """The completions, by sample."""
        return [text for round_ in self.rounds for text in round_.texts]

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        """Their tokens."""
        return [tokens for round_ in self.rounds for tokens in round_.token_ids]

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, prefill included: the mean over rounds."""
        return mean(round_.num_tokens / round_.seconds for round_ in self.rounds)

    @property
    def seconds_per_token(self) -> float:
        """Time per token, prefill included: the mean over rounds."""
        return mean(round_.seconds / max(1, round_.num_tokens) for round_ in self.rounds)

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that was accepted: the mean over rounds that drafted."""
        rates = [r.counters.acceptance_rate for r in self.rounds if r.counters.num_draft_tokens]
        return mean(rates) if rates else None


def run_in_turns(
    samples: Sequence[TaskSample],
    engines: Mapping[str, Mapping[str, Any]],
    max_tokens: int,
    batch_size: int,
    folder: Path,
    track: Callable[[str, int], Callable[[int], None]] = lambda _what, _total: lambda _num: None,
) -> tuple[list[TaskSample], dict[str, TaskRun]]:
    """Have both engines complete all prompts, `batch_size` a round, one engine after the other.

    `engines` has each run's arguments of vLLM's `LLM`, `folder` takes their logs; `track` is called
    with the name of a piece of work and the number of its steps, and gives a function to call with
    the number of steps done. Returns the samples that were asked, those left out that do not fit
    into the model's context, and each run. A ValueError says that an engine failed, or that no
    sample fits.
    """
    with _start(engines, folder) as (processes, facts):
        sizes = _call(processes[PLAIN], "count_prompt_tokens", [s.prompt for s in samples])
        context = facts[PLAIN].max_model_len
        fitting = [
            sample
            for sample, size in zip(samples, sizes, strict=True)
            if size + max_tokens <= context
        ]
        if not fitting:
            raise ValueError(
                f"max_tokens is {max_tokens}, with which no prompt (the shortest has {min(sizes)} "
                f"tokens) fits into the model's context of {context}; it must be less."
            )
        prompts = [sample.prompt for sample in fitting]
        batches = [prompts[at : at + batch_size] for at in range(0, len(prompts), batch_size)]
        advance = track("samples", len(fitting))
        for process in processes.values():
            _call(process, "complete_prompts", batches[0], _NUM_WARM_UP_TOKENS)
        rounds: dict[str, list[TaskRound]] = {name: [] for name in processes}
        for batch in batches:
            for name, process in processes.items():
                rounds[name].append(_call(process, "complete_prompts", batch, max_tokens))
            advance(len(batch))
    return fitting, {name: TaskRun(facts[name], tuple(done)) for name, done in rounds.items()}


@contextlib.contextmanager
def _start(
    engines: Mapping[str, Mapping[str, Any]], folder: Path
) -> Iterator[tuple[dict[str, EngineProcess], dict[str, EngineFacts]]]:
    """Start an engine for each run, and end them whatever happens."""
    variables = list_engine_variables()
    with contextlib.ExitStack() as stack:
        processes, starts = {}, {}
        for name, engine in engines.items():
            process = make_engine_process(name, folder, engine["dtype"], **variables)
            processes[name] = stack.enter_context(process)
        for name, process in processes.items():
            arguments = {"gpu_memory_utilization": SHARE_OF_MEMORY, **engines[name]}
            starts[name] = process.submit(f"{_JOBS}:start_engine", arguments)
            if "kv_cache_memory_bytes" not in arguments:
                # It measures the memory that is free, which the next one's start would change.
                _wait(process, starts[name])
        yield processes, {name: _wait(processes[name], start) for name, start in starts.items()}


def _call(process: EngineProcess, job: str, *args: Any) -> Any:
    return _wait(process, process.submit(f"{_JOBS}:{job}", *args))


def _wait(process: EngineProcess, result: Future[Any]) -> Any:
    try:
        return result.result()
    except JobError as error:
        raise ValueError(say_why_it_failed(process)) from error
