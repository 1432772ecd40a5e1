"""What LayerSkip's recipe costs a training step: time and peak memory, against plain training.

    python -m benchmarks.training.recipe_cost

Each variant trains in a process of its own; the processes take turns, a step each, so that all meet
the same machine. On a CPU memory is measured by processes of its own, which return what they free
at once: what an allocator keeps for later would count too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from layerskip_vllm.tools.hardware import describe_hardware

# `LayerSkipSettings` by variant; None trains plainly. The paper's R for Llama 2 7B is 8.
VARIANTS: Mapping[str, dict[str, Any] | None] = {
    "plain": None,
    "layer dropout": {"max_drop_prob": 0.1, "e_scale": 0.0},
    "exit loss, R = 8": {"max_drop_prob": 0.0, "rotation": 8},
    "both, R = 8": {"max_drop_prob": 0.1, "rotation": 8},
    "exit loss, R = 8, logits kept": {
        "max_drop_prob": 0.0,
        "rotation": 8,
        "recompute_logits": False,
    },
    "exit loss, all exits": {"max_drop_prob": 0.0, "curriculum": "none"},
    "exit loss, all exits, logits kept": {
        "max_drop_prob": 0.0,
        "curriculum": "none",
        "recompute_logits": False,
    },
}


@dataclass(frozen=True)
class Shape:
    """The model and the batch that all variants train on."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    batch_size: int
    seq_len: int
    dtype: str


# glibc's allocator then gives large blocks back when they are freed, which takes time.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
NUM_MEMORY_STEPS = 2
MAX_NUM_STEPS = 10_000

CPU_SHAPE = Shape(16, 256, 8000, batch_size=4, seq_len=128, dtype="float32")
GPU_SHAPE = Shape(16, 2048, 128256, batch_size=4, seq_len=2048, dtype="bfloat16")


@dataclass(frozen=True)
class Cost:
    """What one variant's steps cost."""

    variant: str
    median_ms: float
    peak_bytes: int  # beside the weights, their gradients and the optimizer's state


# --- In a variant's process ---------------------------------------------------------------------


def serve_steps(pipe: Connection, settings: dict[str, Any] | None, shape: Shape) -> None:
    """Train a step whenever told to, and send its time in seconds and the peak memory so far."""
    from layerskip_vllm.training.layer_skip import LayerSkip
    from layerskip_vllm.training.settings import LayerSkipSettings

    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _make_model(shape).to(device)
    layer_skip = None if settings is None else LayerSkip(model, LayerSkipSettings(**settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes its state
    held_bytes = _reset_peak(device)
    with layer_skip or contextlib.nullcontext():
        for step in range(MAX_NUM_STEPS):
            pipe.recv()
            token_ids = torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len))
            token_ids = token_ids.to(device)
            start = time.perf_counter()
            if layer_skip is not None:
                layer_skip.set_step(step, MAX_NUM_STEPS)
            model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            if device == "cuda":
                torch.cuda.synchronize()
            pipe.send((time.perf_counter() - start, _peak_bytes(device) - held_bytes))


def _make_model(shape: Shape) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.hidden_size // 64,
        num_key_value_heads=shape.hidden_size // 128,
        max_position_embeddings=shape.seq_len,
    )
    make: Any = LlamaForCausalLM
    return make(config).to(getattr(torch, shape.dtype)).train()


def _reset_peak(device: str) -> int:
    """Start the peak anew, and return what is held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident
    return _peak_bytes(device)


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


# --- In the parent ------------------------------------------------------------------------------


@contextlib.contextmanager
def start_variants(shape: Shape) -> Iterator[dict[str, Connection]]:
    """Start a process for each variant, with a pipe to it, and end them all whatever happens."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    try:
        for variant, settings in VARIANTS.items():
            pipes[variant], theirs = context.Pipe()
            process = context.Process(target=serve_steps, args=(theirs, settings, shape))
            process.start()
            theirs.close()
            processes.append(process)
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def measure_costs(shape: Shape, num_steps: int) -> list[Cost]:
    """Train all variants in turn, for their time and then for their memory."""
    seconds, peaks = run_in_turn(shape, num_steps)
    if not torch.cuda.is_available():
        os.environ.update(RETURN_FREED_MEMORY)
        _, peaks = run_in_turn(shape, NUM_MEMORY_STEPS)
    return [
        Cost(variant, 1e3 * statistics.median(seconds[variant]), peaks[variant])
        for variant in VARIANTS
    ]


def run_in_turn(shape: Shape, num_steps: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Run `num_steps` steps of each variant, after one more: their seconds, and peaks in bytes."""
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    peaks: dict[str, int] = {}
    with start_variants(shape) as pipes:
        for step in track(range(num_steps + 1), "steps", console=Console(stderr=True)):
            for variant, pipe in pipes.items():
                pipe.send(step)
                took, peaks[variant] = pipe.recv()
                if step > 0:
                    seconds[variant].append(took)
    return seconds, peaks


def make_cost_table(costs: list[Cost]) -> Table:
    """Return the table that is printed; the first variant is what the others compare with."""
    table = Table("recipe", title="Cost of a training step")
    for heading in ("time", "by plain", "peak memory", "by plain"):
        table.add_column(heading, justify="right")
    plain = costs[0]
    for cost in costs:
        table.add_row(
            cost.variant,
            f"{cost.median_ms:.0f} ms",
            f"{cost.median_ms / plain.median_ms:.2f}",
            f"{cost.peak_bytes / 2**20:.0f} MiB",
            f"{cost.peak_bytes / plain.peak_bytes:.2f}",
        )
    return table


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-steps", type=int, default=8, help="timed steps of each variant")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    shape = GPU_SHAPE if torch.cuda.is_available() else CPU_SHAPE
    costs = measure_costs(shape, options.num_steps)
    console = Console()
    console.print(describe_hardware(), shape, f"{options.num_steps} steps of each, in turn")
    console.print(make_cost_table(costs))
    if options.output:
        report = {
            "hardware": describe_hardware(),
            "shape": dataclasses.asdict(shape),
            "num_steps": options.num_steps,
            "costs": [dataclasses.asdict(cost) for cost in costs],
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
