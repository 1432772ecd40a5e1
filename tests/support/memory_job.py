"""Runs in a child of `engine_process`: what an engine's worker holds in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensor

from layerskip_vllm.drafting.bytes_read import num_bytes
from tests.support.child_engines import engine
from tests.support.scenarios import Scenario


@dataclass(frozen=True)
class Holdings:
    """Parameters, buffers and KV cache of a worker.

    Attributes:
        names: Names of the target's parameters.
        storages: Their storages, by address; those without memory (repacked weights) left out.
        num_parameters: All `nn.Parameter` objects that are alive in the process, wherever held.
        all_storages: Their storages.
        layer_bytes: The size of the smallest decoder layer, with weights that vLLM has repacked.
        tensor_bytes: The size of all tensors that are alive, each storage counted once.
        head_bytes: The size of the head.
        drafter: The class of the drafter; None without speculation.
        drafter_names: Names of the parameters, buffers and modules that the drafter's model
            registers.
        kv_cache_bytes: The size of the KV cache.
        num_blocks: Its blocks.
    """

    names: tuple[str, ...]
    storages: frozenset[int]
    num_parameters: int
    all_storages: frozenset[int]
    layer_bytes: int
    tensor_bytes: int
    head_bytes: int
    drafter: str | None
    drafter_names: tuple[str, ...]
    kv_cache_bytes: int
    num_blocks: int


def holdings(scenario: Scenario) -> Holdings:
    """Start an engine and look at what its worker holds."""
    with engine(scenario) as llm:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
        parameters = [p for p in _alive() if isinstance(p, nn.Parameter)]
        target = dict(runner.model.named_parameters(remove_duplicate=False))
        return Holdings(
            names=tuple(sorted(target)),
            storages=_storages(target.values()),
            num_parameters=len(parameters),
            all_storages=_storages(parameters),
            layer_bytes=min(num_bytes(layer) for layer in runner.model.model.layers),
            tensor_bytes=_num_bytes(_alive()),
            head_bytes=num_bytes(runner.model.lm_head),
            drafter=type(drafter).__name__ if drafter is not None else None,
            drafter_names=_registered(drafter.model) if drafter is not None else (),
            kv_cache_bytes=_num_bytes(runner.kv_caches),
            num_blocks=core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        )


def _alive() -> list[torch.Tensor]:
    """All tensors but those that were there before the engine, which are frozen."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
    # Those of a tracer, which an earlier engine's compilation leaves, have no memory.
    return [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]


def _storages(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    return frozenset(t.untyped_storage().data_ptr() for t in tensors if t.numel() and not t.is_meta)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = (t.untyped_storage() for t in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _registered(model: nn.Module) -> tuple[str, ...]:
    return (
        *(name for name, _ in model.named_parameters()),
        *(name for name, _ in model.named_buffers()),
        *(name for name, _ in model.named_modules() if name),
    )
