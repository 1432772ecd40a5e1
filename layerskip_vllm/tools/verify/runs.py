"""The four engines of `layerskip-vllm verify`, one after the other, each in its own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from layerskip_vllm.tools.engine_options import make_engine_process, say_why_it_failed
from layerskip_vllm.tools.engine_process import JobError
from layerskip_vllm.tools.verify.command import VerifyConfig
from layerskip_vllm.tools.verify.engine_run import EngineJob, EngineOutput

# Plain vLLM, the floor: plain vLLM again, drafts, and drafts that nothing verifies.
PLAIN, FLOOR, DRAFTED, UNVERIFIED = RUNS = ("plain", "floor", "layerskip", "unverified")


def run_all(
    config: VerifyConfig,
    prompts: Sequence[str],
    folder: Path,
    track: Callable[[str], None] = lambda name: None,
) -> dict[str, EngineOutput]:
    """Run all engines, `track` called with the name of each; return what each gave, by its name.

    A ValueError says that an engine failed, with the end of its log, which is in `folder`.
    """
    results: dict[str, EngineOutput] = {}
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
    drafted: EngineOutput | None = None,
) -> EngineJob:
    """Say what the engine called `name` is to do.

    No two share a seed: their samples are independent. What the run with drafts gave, `drafted`,
    says how to leave verification out of them.
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
    return EngineJob(config, prompts, engine, name == FLOOR, accepts_everything)


def run_engine(name: str, job: EngineJob, folder: Path) -> EngineOutput:
    """Run an engine in a process of its own and wait for its end, which frees its memory."""
    process = make_engine_process(
        name, folder, job.config.dtype, VLLM_ENABLE_V1_MULTIPROCESSING="0"
    )
    try:
        with process:
            result: EngineOutput = process.run(
                "layerskip_vllm.tools.verify.engine_run:complete", job
            )
            return result
    except JobError as error:
        raise ValueError(say_why_it_failed(process)) from error
