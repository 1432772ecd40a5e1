"""Engines in processes of their own, told over a pipe what to run; a waiting one sleeps on it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ACCEPTED_METRIC = "vllm:spec_decode_num_accepted_tokens"
ROUNDS_METRIC = "vllm:spec_decode_num_drafts"
DRAFTED_METRIC = "vllm:spec_decode_num_draft_tokens"

# An engine that is only to count accepted drafts, of a model of any size that fits a CPU.
COUNTING_ENGINE: Mapping[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 28,
    "enforce_eager": True,
    "disable_log_stats": False,
    "is_engine_process": False,
}


@dataclass(frozen=True)
class Measurement:
    """What one engine did in one round.

    Attributes:
        tokens_per_s: Tokens after each request's first, by the time from the first to the last.
        prefill_s: Time to the first token.
        cpu_s: What the calling process used of the CPU in the round, prefill included: other
            programs disturb it less than they disturb a clock.
        num_rounds: Draft-and-verify rounds, summed over the requests.
        num_drafted: Drafted tokens.
        num_accepted: Accepted ones among them.
        tokens: Each request's tokens.
    """

    tokens_per_s: float
    prefill_s: float
    cpu_s: float
    num_rounds: int
    num_drafted: int
    num_accepted: int
    tokens: list[list[int]] = field(repr=False)

    @property
    def acceptance(self) -> float:
        """Accepted by drafted tokens."""
        return self.num_accepted / self.num_drafted


@dataclass(frozen=True)
class Facts:
    """What an engine takes and holds.

    Attributes:
        peak_memory_bytes: Most memory its process has held so far: on a GPU what PyTorch
            allocated there, else resident memory.
        num_kv_tokens: Tokens for which its KV cache has room.
        device: What it runs on, in vLLM's word.
        mode: "compiled" or "eager".
        num_threads: OpenMP threads.
    """

    peak_memory_bytes: int
    num_kv_tokens: int
    device: str
    mode: str
    num_threads: int


# --- In an engine's process ---------------------------------------------------------------------


def serve_engine(pipe: Connection, engine_args: dict[str, Any], log_path: Path) -> None:
    """Load an engine and run the rounds asked for over the pipe, until there is no more."""
    # Before vLLM is imported. One process has no IPC, no polling neighbour on a scarce core, and
    # memory that can be read off; `--engine-process` gives vLLM's default instead.
    is_engine_process = engine_args.pop("is_engine_process")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if is_engine_process else "0"
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        from vllm import LLM

        llm = LLM(**engine_args)
        pipe.send(_gather_facts(llm))
        while (ask := pipe.recv()) is not None:
            if isinstance(ask, Path):
                pipe.send(llm.collective_rpc("reload_weights", kwargs={"weights_path": str(ask)}))
                continue
            pipe.send(_run_round(llm, **ask))
            pipe.send(_gather_facts(llm))
    except Exception as error:
        traceback.print_exc()
        pipe.send(error)


def _run_round(
    llm: Any, prompts: list[list[int]], max_tokens: int, temperature: float
) -> Measurement:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=temperature, max_tokens=max_tokens, ignore_eos=True, detokenize=False, seed=0
    )
    before, cpu_s = _read_counters(llm), time.process_time()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
    )
    after, cpu_s = _read_counters(llm), time.process_time() - cpu_s
    times = [output.metrics for output in outputs]
    start = min(stamps.first_token_ts for stamps in times)
    end = max(stamps.last_token_ts for stamps in times)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return Measurement(
        tokens_per_s=sum(len(text) - 1 for text in tokens) / (end - start),
        prefill_s=start - min(stamps.queued_ts for stamps in times),
        cpu_s=cpu_s,
        num_rounds=after[ROUNDS_METRIC] - before[ROUNDS_METRIC],
        num_drafted=after[DRAFTED_METRIC] - before[DRAFTED_METRIC],
        num_accepted=after[ACCEPTED_METRIC] - before[ACCEPTED_METRIC],
        tokens=tokens,
    )


def _read_counters(llm: Any) -> dict[str, int]:
    counters = dict.fromkeys((ROUNDS_METRIC, DRAFTED_METRIC, ACCEPTED_METRIC), 0)
    for metric in llm.get_metrics():
        if metric.name in counters:
            counters[metric.name] += metric.value
    return counters


def _gather_facts(llm: Any) -> Facts:
    import torch

    config = llm.llm_engine.vllm_config
    device = config.device_config.device_type
    is_on_gpu = device == "cuda"
    return Facts(
        peak_memory_bytes=torch.cuda.max_memory_allocated()
        if is_on_gpu
        else _peak_resident_bytes(),
        num_kv_tokens=config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        device=device,
        mode="eager" if config.compilation_config.mode == 0 else "compiled",
        num_threads=torch.get_num_threads(),
    )


def _peak_resident_bytes() -> int:
    """Return the peak resident memory of this process and the ones it started, summed."""
    processes, total = [os.getpid()], 0
    while processes:
        process = Path("/proc", str(processes.pop()))
        with contextlib.suppress(OSError):  # one that has just ended
            lines = (process / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
            for thread in (process / "task").iterdir():
                processes += [int(child) for child in (thread / "children").read_text().split()]
    return total


# --- In the parent ------------------------------------------------------------------------------


class Engine:
    """An engine in a process of its own, told over a pipe what to run."""

    def __init__(self, system: str, engine_args: dict[str, Any], log_folder: Path) -> None:
        """Start the process and wait until the engine is loaded."""
        self.system = system
        self.facts: Facts
        self._log_path = log_folder / f"{system}.log"
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve_engine, args=(theirs, engine_args, self._log_path)
        )
        self._process.start()
        theirs.close()
        self.facts = self._receive()

    def run_round(
        self, prompts: list[list[int]], max_tokens: int, temperature: float
    ) -> Measurement:
        """Run one round there and return what it measured."""
        self._pipe.send({"prompts": prompts, "max_tokens": max_tokens, "temperature": temperature})
        measurement = self._receive()
        self.facts = self._receive()
        return measurement

    def reload_weights(self, checkpoint: Path) -> None:
        """Load another checkpoint's weights in place, into the target alone."""
        self._pipe.send(checkpoint)
        self._receive()

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(
                f"the engine of {self.system!r} ended; see {self._log_path}"
            ) from error
        if isinstance(answer, Exception):
            raise RuntimeError(
                f"the engine of {self.system!r} failed; see {self._log_path}"
            ) from answer
        return answer


@contextlib.contextmanager
def run_engines(
    engine_args: Mapping[str, dict[str, Any]], log_folder: Path
) -> Iterator[list[Engine]]:
    """Load the engines one after another, and end them whatever happens.

    Args:
        engine_args: What `LLM` gets, by system.
        log_folder: Folder for a log of each.

    Yields:
        The engines, loaded.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        engines = []
        for system, arguments in engine_args.items():
            engine = Engine(system, arguments, log_folder)
            stack.callback(engine.stop)
            engines.append(engine)
        yield engines
