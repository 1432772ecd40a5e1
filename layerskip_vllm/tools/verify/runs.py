"""The four engines of `layerskip-vllm verify`, one after the other, each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerskip_vllm.tools.verify.config import VerifyConfig
from layerskip_vllm.tools.verify.results import Result, read_result

# Plain vLLM, the floor: plain vLLM again, drafts, and drafts that nothing verifies.
PLAIN, FLOOR, DRAFTED, UNVERIFIED = RUNS = ("plain", "floor", "layerskip", "unverified")

NUM_SAMPLED_PROMPTS = 4
# The first comes from the prompt; a draft and its verification follow.
NUM_SAMPLED_TOKENS = 6


def run_all(
    config: VerifyConfig,
    prompts: Sequence[str],
    folder: Path,
    track: Callable[[str], None] = lambda name: None,
) -> dict[str, Result]:
    """Run all engines.

    Args:
        config: What to run.
        prompts: The prompts.
        folder: Where jobs, results and logs go.
        track: Called with the name of each run as it starts.

    Returns:
        What each engine gave, by its name in `RUNS`.

    Raises:
        ValueError: If an engine fails; the message holds the end of its log.
    """
    results: dict[str, Result] = {}
    for seed, name in enumerate(RUNS):
        track(name)
        job = make_job(name, seed, config, prompts, results.get(DRAFTED))
        results[name] = run_engine(name, job, folder)
    return results


def make_job(
    name: str,
    seed: int,
    config: VerifyConfig,
    prompts: Sequence[str],
    drafted: Result | None = None,
) -> dict[str, Any]:
    """Say what an engine is to do; see `engine_run.run`.

    Args:
        name: One of `RUNS`.
        seed: The engine's seed, which no two share: their samples are independent.
        config: What to run.
        prompts: The prompts.
        drafted: What the run with drafts gave, which says how to leave verification out of them.

    Returns:
        The job.
    """
    engine = {
        **config.engine,
        "model": config.model,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "seed": seed,
    }
    if name in (DRAFTED, UNVERIFIED):
        engine["speculative_config"] = {"method": "layerskip", **config.speculative}
    accepts_everything = False
    if name == UNVERIFIED and drafted is not None:
        # Model Runner V2 can accept everything by itself, V1 cannot on a CPU.
        accepts_everything = drafted.runner == "V1"
        if not accepts_everything:
            rates = [1.0] * drafted.num_speculative_tokens
            engine["speculative_config"] |= {
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rates": rates,
            }
    return {
        "engine": engine,
        "prompts": list(prompts),
        "num_prompt_tokens": config.num_prompt_tokens,
        "is_reversed": name == FLOOR,
        "accepts_everything": accepts_everything,
        "max_tokens": config.max_tokens,
        "num_sampled_prompts": NUM_SAMPLED_PROMPTS,
        "num_samples": config.num_samples,
        "num_sampled_tokens": NUM_SAMPLED_TOKENS,
    }


def run_engine(name: str, job: dict[str, Any], folder: Path) -> Result:
    """Run an engine in a process of its own and wait for its end, which frees its memory.

    Args:
        name: What its files are called.
        job: What it is to do.
        folder: Where they go.

    Returns:
        What it gave.

    Raises:
        ValueError: If it fails.
    """
    job_path, result_path, log_path = (
        folder / f"{name}.{suffix}" for suffix in ("job.json", "result.json", "log")
    )
    job_path.write_text(json.dumps(job, indent=2))
    result_path.unlink(missing_ok=True)
    environment = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with log_path.open("wb") as log:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "layerskip_vllm.tools.verify.engine_run"),
                *(str(job_path), str(result_path)),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0 or not result_path.exists():
        end = log_path.read_text(errors="replace").strip().splitlines()[-3:]
        raise ValueError(
            f"the {name} run failed with exit status {done.returncode}; {log_path} ends:\n  "
            + "\n  ".join(end)
        )
    return read_result(result_path)
