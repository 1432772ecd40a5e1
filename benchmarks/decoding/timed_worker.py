"""What the benchmarks ask of a GPU's worker, a `worker_extension_cls` of vLLM's.

Runs in the worker, which may be a process of its own; nothing here imports vLLM.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

_NUM_FIRST, _NUM_TIMED = 5, 20


class TimedWorker:
    """Methods that `collective_rpc` calls by name."""

    model_runner: Any

    def read_peak_memory(self) -> int:
        """Return the most bytes that PyTorch has held on the GPU so far."""
        return torch.cuda.max_memory_allocated()

    def time_steps(self, batch_size: int, context_len: int) -> tuple[float, float] | None:
        """Time steps of decoding with no requests behind them, by CUDA events.

        Differs from a step of requests: drafts attend to one token.

        Args:
            batch_size: How many requests a step is to have.
            context_len: The tokens before each one's.

        Returns:
            The median milliseconds of the target, which verifies, and of all draft steps; None
            without drafts, and on Model Runner V1, which does not time steps.
        """
        runner = self.model_runner
        if getattr(runner, "speculator", None) is None:
            return None
        num_tokens = batch_size * runner.decode_query_len
        with runner.step_timing.collect() as steps:
            for _ in range(_NUM_FIRST + _NUM_TIMED):
                runner._dummy_run(num_tokens, uniform_decode=True, context_len=context_len)
        timed = steps[_NUM_FIRST:]
        return (
            statistics.median(step.forward_ms for step in timed),
            statistics.median(step.drafter_ms for step in timed),
        )
