"""The engines in a child of `engine_process`: new ones, and those that scenarios share."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

from vllm import LLM
from vllm.distributed import destroy_model_parallel
from vllm.utils.torch_utils import set_random_seed

from tests.support.engine_process import IS_ON_GPU
from tests.support.scenarios import Scenario

_ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "block_size": 32,  # the least that CPU attention takes
    "kv_cache_memory_bytes": 1 << 24,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "seed": 0,
}
if IS_ON_GPU:
    # With CUDA graphs, of the target and of the drafts, but without the minute that compiling
    # takes; and with room for the engines of other processes.
    _ENGINE |= {
        "enforce_eager": False,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "gpu_memory_utilization": 0.2,
    }

# By model and all else that makes an engine. All are of one model, since a mixture of experts has
# process groups that others have not, and all end together: a shutdown ends the groups of all.
_shared: dict[tuple[str, str], LLM] = {}
_MAX_SHARED = 8

# vLLM collects garbage eleven times in an engine's life, which takes 0.4 s each as long as it looks
# through all that was imported. That is frozen here; vLLM would thaw it at an engine's end.
_freeze = gc.freeze
gc.freeze = gc.unfreeze = lambda: None


@contextlib.contextmanager
def engine(scenario: Scenario) -> Iterator[LLM]:
    """A new engine for a scenario, the only one of its process."""
    _end_shared()
    llm = _start(scenario)
    try:
        yield llm
    finally:
        _end(llm)


@contextlib.contextmanager
def shared_engine(scenario: Scenario) -> Iterator[LLM]:
    """An engine for a scenario, as good as new: that of an earlier one if it was made alike."""
    settings = {name: value for name, value in scenario.engine.items() if name != "seed"}
    key = scenario.model, repr((scenario.speculative, settings, _is_async(scenario)))
    if key not in _shared:
        if len(_shared) == _MAX_SHARED or any(model != scenario.model for model, _ in _shared):
            _end_shared()
        _shared[key] = _start(scenario)
    llm = _shared[key]
    set_random_seed(scenario.engine.get("seed", _ENGINE["seed"]))
    try:
        yield llm
        settle(llm)
    except BaseException:
        _end_shared()
        raise


def _start(scenario: Scenario) -> LLM:
    if not _shared:
        gc.collect()
        _freeze()
    with _async_scheduling() if _is_async(scenario) else contextlib.nullcontext():
        return LLM(
            model=scenario.model,
            speculative_config=scenario.speculative and dict(scenario.speculative),
            async_scheduling=None if _is_async(scenario) else False,
            **{**_ENGINE, **scenario.engine},
        )


def settle(llm: LLM) -> None:
    """Run what is scheduled ahead, and forget what is cached."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests() or core.batch_queue:
        llm.llm_engine.step()
    assert llm.reset_prefix_cache()


def _end_shared() -> None:
    while _shared:
        _end(_shared.popitem()[1])


def _end(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    destroy_model_parallel()


def _is_async(scenario: Scenario) -> bool:
    if scenario.is_async is not None:
        return scenario.is_async
    return scenario.speculative is not None and os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"


@contextlib.contextmanager
def _async_scheduling() -> Iterator[None]:
    """Keep asynchronous scheduling as vLLM resolves it; the CPU platform always ends it."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.__dict__["check_and_update_config"]

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        is_async = vllm_config.scheduler_config.async_scheduling
        original.__func__(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = is_async

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original
