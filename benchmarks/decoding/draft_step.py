"""Where the time of decoding goes on Model Runner V1, plain and with layerskip, a line a part.

    python -m benchmarks.decoding.draft_step

Engines run one after the other in a process of their own, with a stopwatch around vLLM's functions
and the drafter's. It counts the CPU time of their thread, which other programs hardly disturb.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from rich.table import Table

from benchmarks.serving.vllm_command import LAYERSKIP, PLAIN, build_env
from layerskip_vllm.tools.engine_process import EngineProcess
from layerskip_vllm.tools.hardware import describe_hardware
from layerskip_vllm.tools.output import make_console
from layerskip_vllm.tools.prompts import held_out_prompts

MODEL = "checkpoints/stdlib-24l"
LOG_FOLDER = Path("benchmark-output/logs")

_PROPOSER = "layerskip_vllm.drafting.proposer"
_ATTENTION = "layerskip_vllm.drafting.draft_attention"
_EXIT_MODEL = "layerskip_vllm.drafting.exit_model:ExitModel"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
# The functions of each part, in the order of a step; their time is without that of other parts. In
# a draft the parts of the verification, which the drafter calls too, are the draft's.
DRAFT_PARTS: Mapping[str, Sequence[str]] = {
    "draft: inputs, slots": (
        f"{_RUNNER}:GPUModelRunner.propose_draft_token_ids",
        f"{_PROPOSER}:LayerSkipProposer.propose",
    ),
    "draft: attention metadata": (f"{_ATTENTION}:DraftAttention.build_step",),
    "draft: forward context": (f"{_PROPOSER}:set_forward_context",),
    "draft: exit model": (f"{_EXIT_MODEL}.forward",),
    "draft: head": (f"{_EXIT_MODEL}.compute_logits",),
    "draft: sampling": (f"{_PROPOSER}:LayerSkipProposer._sample_draft_tokens",),
}
STEP_PARTS: Mapping[str, Sequence[str]] = {
    "schedule": ("vllm.v1.core.sched.scheduler:Scheduler.schedule",),
    "inputs, slots": (
        f"{_RUNNER}:GPUModelRunner._update_states",
        f"{_RUNNER}:GPUModelRunner._prepare_inputs",
        f"{_RUNNER}:GPUModelRunner._get_slot_mappings",
    ),
    "attention metadata": (f"{_RUNNER}:GPUModelRunner._build_attention_metadata",),
    "forward context": (f"{_RUNNER}:set_forward_context",),
    "target": (f"{_RUNNER}:GPUModelRunner._model_forward",),
    "head": ("vllm.model_executor.models.llama:LlamaForCausalLM.compute_logits",),
    "sampling, rejection": (f"{_RUNNER}:GPUModelRunner._sample",),
    "the rest of the runner": (
        f"{_RUNNER}:GPUModelRunner.execute_model",
        f"{_RUNNER}:GPUModelRunner.sample_tokens",
    ),
    "outputs": (
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
    ),
    "the rest of the engine": ("vllm.v1.engine.llm_engine:LLMEngine.step",),
}


@dataclass(frozen=True)
class Timing:
    """Where a batch's time went.

    Attributes:
        microseconds: CPU time of each part in a step, the median over the steps.
        tokens_per_step: What a step gave a request, on average.
    """

    microseconds: Mapping[str, float]
    tokens_per_step: float


# --- In the engine's process --------------------------------------------------------------------


class Stopwatch:
    """Times functions; what one calls of the others is theirs alone."""

    def __init__(self) -> None:
        """Start with no function watched."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._part = ""
        self._since_s = 0.0

    def watch(self, part: str, name: str) -> None:
        """Put itself around a function.

        Args:
            part: What its time counts as.
            name: The function as `module:name`, or `module:class.name`.
        """
        owner_name, _, function_name = name.replace(":", ".").rpartition(".")
        owner = resolve_name(owner_name)
        function = getattr(owner, function_name)
        measure: Callable[..., Any] = functools.partial(self._call, part, function)
        if hasattr(function, "__wrapped__") and function_name == "set_forward_context":
            measure = functools.partial(self._enter, part, function)
        # A function, not a partial, so that it is a method where the one it replaces was.
        setattr(owner, function_name, lambda *args, **kwargs: measure(*args, **kwargs))

    def take(self) -> Mapping[str, float]:
        """Return the seconds of each part since it was last asked."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds

    def _call(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._measure(part):
            return function(*args, **kwargs)

    @contextlib.contextmanager
    def _enter(
        self, part: str, context: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        with self._measure(part), context(*args, **kwargs) as entered:
            yield entered

    @contextlib.contextmanager
    def _measure(self, part: str) -> Iterator[None]:
        outer = self._part
        if outer in DRAFT_PARTS and part in STEP_PARTS:
            part = outer
        self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, part: str) -> None:
        now_s = time.thread_time()
        self._seconds[self._part] += now_s - self._since_s
        self._part, self._since_s = part, now_s


def time_steps(
    is_plain: bool, batch_sizes: Sequence[int], num_batches: int, max_tokens: int
) -> dict[int, Timing]:
    """Decode batches of held-out prompts greedily; a job of `EngineProcess`.

    Args:
        is_plain: Whether to decode without drafts.
        batch_sizes: Requests at once.
        num_batches: How many batches of each size are timed, after one that is not.
        max_tokens: Tokens of a text.

    Returns:
        The timings by batch size.
    """
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    llm = LLM(
        MODEL,
        dtype="float32",
        max_num_seqs=max(batch_sizes),
        kv_cache_memory_bytes=1 << 28,
        speculative_config=None if is_plain else {"method": "layerskip"},
    )
    stopwatch = Stopwatch()
    for part, functions in (STEP_PARTS if is_plain else {**DRAFT_PARTS, **STEP_PARTS}).items():
        for function in functions:
            stopwatch.watch(part, function)
    steps: list[Mapping[str, float]] = []
    engine_step = LLMEngine.step

    def step(self: LLMEngine) -> Any:
        outputs = engine_step(self)
        steps.append(stopwatch.take())
        return outputs

    LLMEngine.step = step  # type: ignore[method-assign]
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    timings = {}
    for batch_size in batch_sizes:
        prompts = held_out_prompts(batch_size * (num_batches + 1))
        llm.generate(prompts[:batch_size], sampling, use_tqdm=False)
        steps.clear()
        for start in range(batch_size, len(prompts), batch_size):
            llm.generate(prompts[start : start + batch_size], sampling, use_tqdm=False)
        parts = [*DRAFT_PARTS, *STEP_PARTS]
        medians = {part: 1e6 * statistics.median(step[part] for step in steps) for part in parts}
        timings[batch_size] = Timing(medians, num_batches * max_tokens / len(steps))
    return timings


# --- In the parent ------------------------------------------------------------------------------


def make_step_table(batch_size: int, plain: Timing, layerskip: Timing) -> Table:
    """Lay one batch size out: microseconds a step, and what they come to for a token."""
    table = Table(title=f"{batch_size} at once: microseconds a step")
    table.add_column("part")
    table.add_column(PLAIN, justify="right")
    table.add_column(LAYERSKIP, justify="right")
    for part in (*DRAFT_PARTS, *STEP_PARTS):
        times = (timing.microseconds[part] for timing in (plain, layerskip))
        table.add_row(part, *(f"{time:.0f}" if time else "" for time in times))
    table.add_section()
    wholes = [sum(timing.microseconds.values()) for timing in (plain, layerskip)]
    lengths = [timing.tokens_per_step for timing in (plain, layerskip)]
    table.add_row("a step", *(f"{whole:.0f}" for whole in wholes))
    table.add_row("tokens a step and request", *(f"{length:.2f}" for length in lengths))
    table.add_row("times plain", "1.00", f"{wholes[0] / wholes[1] * lengths[1] / lengths[0]:.2f}")
    return table


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-batches", type=int, default=4, help="timed batches of each size")
    parser.add_argument("--max-tokens", type=int, default=192, help="tokens a text")
    options = parser.parse_args()
    timings = {}
    for name in (PLAIN, LAYERSKIP):
        env = build_env(name, MODEL, is_gpu=False) | {
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1)),  # as a server has
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
        }
        with EngineProcess(name, LOG_FOLDER / f"draft-step-{name}.log", env) as process:
            timings[name] = process.run(
                f"{__spec__.name}:time_steps",
                name == PLAIN,
                options.batch_sizes,
                options.num_batches,
                options.max_tokens,
            )
    console = make_console()
    console.print(describe_hardware())
    for batch_size in options.batch_sizes:
        console.print(
            make_step_table(batch_size, *(by_size[batch_size] for by_size in timings.values()))
        )


if __name__ == "__main__":
    main()
