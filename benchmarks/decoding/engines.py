"""Engines in processes of their own that take turns; a waiting one sleeps on its pipe.

They start at the same time: most of a start is one thread's work.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip_vllm.tools.engine_process import EngineProcess
from layerskip_vllm.tools.float32 import float32_env
from layerskip_vllm.tools.hardware import list_gpu_names
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters

if TYPE_CHECKING:
    from vllm import LLM

# An engine that is only to count accepted drafts, of a model of any size that fits a CPU.
COUNTING_ENGINE: Mapping[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 28,
    "enforce_eager": True,
    "disable_log_stats": False,
}


TRANSFORMERS = "benchmarks.decoding.transformers_engine"
# What vLLM says on both model runners.
_CAPTURED = re.compile(r"Graph capturing finished in (\d+) secs, took (-?[\d.]+) GiB")


@dataclass(frozen=True)
class StepTimes:
    """What a step of decoding takes a GPU, by CUDA events; the median over steps.

    Attributes:
        forward_ms: The target, which verifies.
        drafter_ms: All K draft steps.
    """

    forward_ms: float
    drafter_ms: float


@dataclass(frozen=True)
class Measurement:
    """What one engine did in one round.

    Attributes:
        tokens_per_s: Tokens after each request's first, by the time from the first to the last.
        prefill_s: Time to the first token.
        cpu_s: What the calling process used of the CPU in the round, prefill included: other
            programs disturb it less than they disturb a clock.
        counters: What was drafted and accepted, summed over the requests.
        tokens: Each request's tokens.
        tpot_s: Each request's time per output token after its first.
    """

    tokens_per_s: float
    prefill_s: float
    cpu_s: float
    counters: SpecDecodeCounters
    tokens: list[list[int]] = field(repr=False)
    tpot_s: tuple[float, ...] = ()


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
        start_s: What its start took, beside those of the others.
        capture_s: Of it, the capture of CUDA graphs, in whole seconds; None without any.
        graph_gib: What the graphs take.
    """

    peak_memory_bytes: int
    num_kv_tokens: int
    device: str
    mode: str
    num_threads: int
    start_s: float
    capture_s: int | None = None
    graph_gib: float | None = None


# --- In an engine's process ---------------------------------------------------------------------


_llm: LLM  # the process's own
_start_s: float


def load(engine_args: dict[str, Any]) -> Facts:
    """Load the engine, and keep it for the rounds."""
    global _llm, _start_s
    from vllm import LLM

    start_s = time.perf_counter()
    _llm = LLM(**engine_args, worker_extension_cls="benchmarks.decoding.timed_worker.TimedWorker")
    _start_s = time.perf_counter() - start_s
    return _gather_facts(_llm)


def run_round(
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float,
    extra_args: dict[str, Any] | None = None,
) -> tuple[Measurement, Facts]:
    """Decode a batch to its full length, with such arguments of layerskip's in each request."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        seed=0,
        extra_args=extra_args,
    )
    before, cpu_s = SpecDecodeCounters.read_own(), time.process_time()
    outputs = _llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False
    )
    after, cpu_s = SpecDecodeCounters.read_own(), time.process_time() - cpu_s
    times: list[Any] = [output.metrics for output in outputs]  # there with statistics on
    start = min(stamps.first_token_ts for stamps in times)
    end = max(stamps.last_token_ts for stamps in times)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    measurement = Measurement(
        tokens_per_s=sum(len(text) - 1 for text in tokens) / (end - start),
        prefill_s=start - min(stamps.queued_ts for stamps in times),
        cpu_s=cpu_s,
        counters=after - before,
        tokens=tokens,
        tpot_s=tuple(
            (stamps.last_token_ts - stamps.first_token_ts) / (len(text) - 1)
            for stamps, text in zip(times, tokens, strict=True)
        ),
    )
    return measurement, _gather_facts(_llm)


def time_dummy_steps(batch_size: int, context_len: int) -> StepTimes | None:
    """Time steps of decoding by themselves, where the worker can."""
    times = _llm.collective_rpc("time_steps", args=(batch_size, context_len))[0]
    return StepTimes(*times) if times else None


def reload_weights(checkpoint: Path) -> None:
    """Load another checkpoint's weights in place, into the target alone."""
    _llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoint)})


def _gather_facts(llm: LLM) -> Facts:
    import torch

    config = llm.llm_engine.vllm_config
    device = config.device_config.device_type
    num_blocks = config.cache_config.num_gpu_blocks
    assert num_blocks is not None  # it is loaded
    # A GPU's worker may be in another process, whose memory PyTorch here knows nothing of.
    is_on_gpu = device == "cuda"
    return Facts(
        peak_memory_bytes=max(llm.collective_rpc("read_peak_memory"))
        if is_on_gpu
        else peak_resident_bytes(),
        num_kv_tokens=num_blocks * config.cache_config.block_size,
        device=device,
        mode="eager" if config.compilation_config.mode == 0 else "compiled",
        num_threads=torch.get_num_threads(),
        start_s=_start_s,
    )


def peak_resident_bytes() -> int:
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
    """An engine in a process of its own, the parent's side.

    Attributes:
        system: What it is called.
        facts: What it takes and holds, by now.
    """

    system: str
    facts: Facts

    def __init__(self, system: str, engine_args: Mapping[str, Any], process: EngineProcess) -> None:
        """Begin to load the engine."""
        self.system = system
        self._process = process
        # The module whose functions load it and run its rounds.
        self._module = TRANSFORMERS if system.startswith("transformers") else __name__
        self._loading = process.submit(f"{self._module}:load", dict(engine_args))

    def wait_until_loaded(self) -> None:
        """Wait until it can run rounds."""
        self._update(self._loading.result())

    def run_round(
        self, prompts: list[list[int]], max_tokens: int, temperature: float
    ) -> Measurement:
        """Run one round there and return what it measured."""
        measurement: Measurement
        measurement, facts = self._process.run(
            f"{self._module}:run_round", prompts, max_tokens, temperature
        )
        self._update(facts)
        return measurement

    def time_steps(self, batch_size: int, context_len: int) -> StepTimes | None:
        """Time steps of decoding there, on a GPU."""
        times: StepTimes | None = self._process.run(
            f"{__name__}:time_dummy_steps", batch_size, context_len
        )
        return times

    def call(self, job: str, *args: Any) -> Any:
        """Call a function of the caller's there, `module:name`."""
        return self._process.run(job, *args)

    def _update(self, facts: Facts) -> None:
        if captured := _CAPTURED.search(self._process.log):
            seconds, gib = captured.groups()
            facts = replace(facts, capture_s=int(seconds), graph_gib=float(gib))
        self.facts = facts

    def reload_weights(self, checkpoint: Path) -> None:
        """Load another checkpoint's weights in place, into the target alone."""
        self._process.run(f"{__name__}:reload_weights", checkpoint)


@contextlib.contextmanager
def run_engines(
    engine_args: Mapping[str, Mapping[str, Any]],
    log_folder: Path,
    is_engine_process: bool = False,
) -> Iterator[list[Engine]]:
    """Load the engines, and end them whatever happens.

    Args:
        engine_args: What `LLM` gets, by system.
        log_folder: Folder for a log of each.
        is_engine_process: Whether each runs as `LLM` does by default, in a process of its own once
            more. One process has no IPC, no polling neighbour on a scarce core, and memory that can
            be read off.

    Yields:
        The engines, loaded.
    """
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(is_engine_process)),
        "VLLM_LOGGING_LEVEL": "INFO",  # it has what the CUDA graphs took
    }
    if not list_gpu_names():  # vLLM would leave one thread to an engine in its caller's process
        env.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    with contextlib.ExitStack() as stack:
        engines = []
        for system, arguments in engine_args.items():
            own = env | float32_env(arguments["dtype"])
            process = EngineProcess(system, log_folder / f"{system}.log", own)
            engines.append(Engine(system, arguments, stack.enter_context(process)))
        for engine in engines:
            engine.wait_until_loaded()
        yield engines
