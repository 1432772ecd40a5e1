"""Counts what a draft costs the host: CUDA graphs, their capture, launches and time a round.

Needs a stand-in GPU whose runtime counts, in `nullgpu_counts`: launches while a stream captures,
other launches, copies, graph launches. Run under its environment, as `check.py` is.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

BATCH_SIZES = (1, 4)
MAX_TOKENS = 40


def counts() -> tuple[int, ...]:
    """Launches in captures, launches, copies and graph launches so far."""
    return tuple((ctypes.c_ulonglong * 6).in_dll(ctypes.CDLL(None), "nullgpu_counts"))[:4]


class Watched:
    """A function, with the time and the counts of each call."""

    def __init__(self, function: Any):
        self.function = function
        self.calls: list[tuple[float, ...]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, start = counts(), time.perf_counter()
        result = self.function(*args, **kwargs)
        elapsed = 1000 * (time.perf_counter() - start)
        self.calls.append((elapsed, *(a - b for a, b in zip(counts(), before, strict=True))))
        return result

    def medians(self) -> list[float]:
        """Milliseconds and counts of the middle calls, those of a steady batch."""
        middle = self.calls[len(self.calls) // 3 : -len(self.calls) // 5]
        return [round(statistics.median(column), 3) for column in zip(*middle, strict=True)]


def measure(model: str, num_speculative_tokens: int) -> dict[str, Any]:
    """Start an engine, decode a batch of each size, and count.

    Args:
        model: A checkpoint.
        num_speculative_tokens: K.
    """
    import null_tokens

    null_tokens.apply()
    from vllm import LLM, SamplingParams

    from layerskip_vllm.drafting.speculator import LayerSkipSpeculator

    captures = Watched(LayerSkipSpeculator.capture)
    LayerSkipSpeculator.capture = lambda self: captures(self)  # type: ignore[method-assign]
    llm = LLM(
        model,
        max_model_len=256,
        max_num_seqs=16,
        gpu_memory_utilization=0.5,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        speculative_config={
            "method": "layerskip",
            "exit_layer": 2,
            "num_speculative_tokens": num_speculative_tokens,
        },
    )
    core = llm.llm_engine.engine_core.engine_core
    speculator = core.model_executor.driver_worker.worker.model_runner.speculator
    num_graphs = len(speculator.graphs.graphs)
    capture_ms, num_nodes, *_ = captures.calls[-1]
    result: dict[str, Any] = {
        "K": num_speculative_tokens,
        "graphs": num_graphs,
        "nodes": int(num_nodes),
        "capture_ms": round(capture_ms),
    }
    propose = speculator.propose
    for batch_size in BATCH_SIZES:
        speculator.propose = drafts = Watched(propose)
        prompts = [{"prompt_token_ids": [2 + row, 3, 4, 5, 6]} for row in range(batch_size)]
        sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.0)
        llm.generate(prompts, sampling, use_tqdm=False)
        host_ms, _, launches, copies, replays = drafts.medians()
        result[f"batch {batch_size}"] = {
            "host_ms": host_ms,
            "launches": int(launches),
            "copies": int(copies),
            "replays": int(replays),
        }
    return result


def main() -> int:
    """Measure each K in a process of its own and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, nargs="*", default=[2, 4, 8], help="values of K")
    parser.add_argument("--model", help="a checkpoint; a tiny random one is made if not given")
    args = parser.parse_args()
    if args.model:
        print("result:", json.dumps(measure(args.model, args.k[0])))
        return 0
    from tests.support.checkpoints import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        model = str(make_checkpoint(Path(folder) / "model"))
        for k in args.k:
            done = subprocess.run(
                [sys.executable, __file__, "--k", str(k), "--model", model],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("result:")]
            print(lines[-1] if lines else done.stdout[-3000:], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
