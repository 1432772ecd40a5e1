"""One engine of `layerskip-vllm tune`, in a process of its own: it times steps and rounds."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerskip_vllm.tools.bench.engine_run import EngineFacts, find_facts

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

_MIN_TIMED_STEPS = 5
_MAX_TIMED_STEPS = 100
# The first steps after a prompt's: their drafts were made in it, and graphs may be new.
_NUM_STEPS_BEFORE = 3

_llm: LLM  # the process's own
_next_id = itertools.count()


@dataclass(frozen=True)
class TunedEngine:
    """What an engine is, and what its start took."""

    facts: EngineFacts
    start_s: float
    least_reused: int  # drafts of a step in which `reuse_exit_states` "auto" reuses them


def load_engine(engine: Mapping[str, Any]) -> TunedEngine:
    """Start the engine, and keep it."""
    global _llm
    from vllm import LLM

    from layerskip_vllm.drafting.verifier import MIN_NUM_KEPT

    start_s = time.perf_counter()
    _llm = LLM(**engine, disable_log_stats=False)
    return TunedEngine(
        find_facts(_llm.llm_engine.vllm_config), time.perf_counter() - start_s, MIN_NUM_KEPT
    )


def time_decoding(prompts: Sequence[list[int]], num_drafts: int | None, seconds: float) -> float:
    """Return what a step takes that decodes for all prompts, the median of about so many seconds.

    Each drafts `num_drafts` tokens; None in an engine that does not draft.
    """
    engine = _llm.llm_engine
    longest = max(map(len, prompts))
    params = _greedy(engine.vllm_config.model_config.max_model_len - longest, num_drafts)
    names = [f"timed-{next(_next_id)}" for _ in prompts]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    waiting = set(names)
    while waiting:
        waiting -= {output.request_id for output in engine.step()}
    for _ in range(_NUM_STEPS_BEFORE):
        engine.step()
    times: list[float] = []
    start_s = last_s = time.perf_counter()
    while len(times) < _MIN_TIMED_STEPS or last_s - start_s < seconds:
        outputs, now_s = engine.step(), time.perf_counter()
        if any(output.finished for output in outputs) or len(times) == _MAX_TIMED_STEPS:
            break
        if len(outputs) == len(prompts):
            times.append(now_s - last_s)
        last_s = now_s
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    if not times:
        raise ValueError(
            f"max_model_len is {engine.vllm_config.model_config.max_model_len}, in which prompts "
            f"of {longest} tokens leave no step to time; it must be more."
        )
    return statistics.median(times)


def decode(prompts: Sequence[list[int]], max_tokens: int, num_drafts: int | None) -> float:
    """Decode a batch to its full length; return its tokens a second, prompts left out.

    Each request drafts `num_drafts` tokens; None leaves it to the engine.
    """
    inputs: list[TokensPrompt] = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = _llm.generate(inputs, _greedy(max_tokens, num_drafts), use_tqdm=False)
    stamps: list[Any] = [output.metrics for output in outputs]  # there with statistics on
    seconds: float = max(s.last_token_ts for s in stamps) - min(s.first_token_ts for s in stamps)
    num_tokens = sum(len(output.outputs[0].token_ids) - 1 for output in outputs)
    return num_tokens / seconds


def _greedy(max_tokens: int, num_drafts: int | None) -> SamplingParams:
    from vllm import SamplingParams

    from layerskip_vllm.config.request import FIELD, KEY

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if num_drafts is None else {KEY: {FIELD: num_drafts}},
    )
