"""Stages: the first layers of a loaded model, sliced and compiled to run as a model of their own.

A vLLM model with pipeline parallelism runs its layers [start_layer, end_layer); one that vLLM runs
through transformers has a list of layers. A stage is a shallow copy of it with another end, or with
a shorter list, so that it shares every weight, and whatever replaces a layer (an adapter, a weight
update) replaces it in the stage. Made in the worker, after loading.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from layerskip_vllm.config.speculative import get_layerskip_config


def find_sliceable_model(target: nn.Module) -> nn.Module:
    """Find the one module whose forward runs a slice of the layers.

    Args:
        target: The whole model.

    Returns:
        That module of it, such as vLLM's `LlamaModel`.

    Raises:
        ValueError: If there is none, or more than one.
    """
    found = [module for module in target.modules() if _runs_a_slice(module)]
    if len(found) != 1:
        names = ", ".join(type(module).__name__ for module in found) or "none"
        raise ValueError(
            f"model {type(target).__name__} must have one module whose forward runs the layers "
            f"[start_layer, end_layer), for layerskip to draft with a slice; found: {names}."
        )
    return found[0]


def _runs_a_slice(module: nn.Module) -> bool:
    if isinstance(module, PreTrainedModel):
        return _name_of_layers(module) is not None
    if not isinstance(getattr(module, "end_layer", None), int):
        return False
    forwards = (vars(cls)["forward"] for cls in type(module).__mro__ if "forward" in vars(cls))
    for forward in forwards:
        if "super" not in forward.__code__.co_names:
            return "end_layer" in forward.__code__.co_names
    return False


def layers_of(inner: nn.Module) -> nn.ModuleList:
    """Return the layers that an inner model runs."""
    layers = getattr(inner, str(_name_of_layers(inner)))
    assert isinstance(layers, nn.ModuleList)
    return layers


def _name_of_layers(inner: nn.Module) -> str | None:
    if isinstance(inner, PreTrainedModel):
        num_layers = getattr(inner.config, "num_hidden_layers", None)
    else:
        num_layers = inner.end_layer
    for name, child in inner.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return name
    return None


@dataclass(frozen=True)
class PipelineRank:
    """What a stage's forward is told of the pipeline: whether it embeds, whether it has the norm.

    A stage that does not come first takes `IntermediateTensors`; one that does not come last gives
    them.
    """

    is_first_rank: bool
    is_last_rank: bool


FIRST_RANK = PipelineRank(is_first_rank=True, is_last_rank=False)
LAST_RANK = PipelineRank(is_first_rank=False, is_last_rank=True)


def make_stage(
    inner: nn.Module,
    layers: range,
    vllm_config: VllmConfig,
    rank: PipelineRank | None = None,
    is_eager: bool = False,
) -> nn.Module:
    """Make the stage of an inner model that runs some of its layers, in turn.

    Args:
        inner: The module that runs the layers, such as vLLM's `LlamaModel`.
        layers: Which of them.
        vllm_config: The configuration that `inner` was built with.
        rank: Which rank of a pipeline `run_as` will run it as; None for the whole of one, from
            the embedding to the norm.
        is_eager: Whether to leave the stage uncompiled where `inner` is compiled.

    Returns:
        A module that shares the submodules of `inner`, compiled on its own where `inner` is.

    Raises:
        ValueError: If there is a rank, and vLLM runs the model through transformers.
    """
    if isinstance(inner, PreTrainedModel):
        if rank is not None:
            reuse = get_layerskip_config(vllm_config).reuse_exit_states
            raise ValueError(
                f"reuse_exit_states is {reuse!r}, but {type(inner).__name__} runs through "
                "transformers, whose layers vLLM cannot begin in the middle of; leave it out."
            )
        name = str(_name_of_layers(inner))
        children = nn.ModuleList(layers_of(inner)[layers.start : layers.stop])
        stage = _with_child(inner, name, children)
    else:
        stage = copy.copy(inner)  # `_modules` stays the same dict: replaced layers are seen here
        vars(stage).update(start_layer=layers.start, end_layer=layers.stop)
    is_compiled = not getattr(inner, "do_not_compile", True)
    if is_compiled and is_eager:
        vars(stage)["do_not_compile"] = True
    elif is_compiled:
        kind = {None: "exit", FIRST_RANK: "first", LAST_RANK: "last"}[rank]
        suffix = f"{kind}{layers.start}to{layers.stop}"
        _compile_apart(stage, type(inner), suffix, vllm_config)
    return stage


@contextmanager
def run_as(rank: PipelineRank) -> Iterator[None]:
    """Run a stage as a rank of a pipeline, whose models ask `get_pp_group()` which they are."""
    group = parallel_state._PP
    parallel_state._PP = rank  # type: ignore[assignment]
    try:
        yield
    finally:
        parallel_state._PP = group


def _compile_apart(
    stage: Any, inner_class: type[nn.Module], suffix: str, vllm_config: VllmConfig
) -> None:
    """Have vLLM compile a stage that is a copy of a compiled module.

    vLLM keys compiled code by the code object and, on disk, by its qualified name and first line:
    a stage that shared them with its inner model would load the inner model's graphs.
    """
    stage.__class__ = type(
        f"{inner_class.__name__}_{suffix}",
        (inner_class,),
        {"forward": _renamed(inner_class.forward, suffix), "__module__": inner_class.__module__},
    )
    stage.__dict__.pop("aot_compiled_fn", None)
    with set_current_vllm_config(vllm_config):
        TorchCompileWithNoGuardsWrapper.__init__(stage, compile_prefix=f"layerskip_{suffix}")
    stage._compile_tag = f"layerskip_{suffix}"


def put_in_place(replacements: Mapping[nn.Module, nn.Module], module: nn.Module) -> nn.Module:
    """Copy what `module` needs to run others in the place of some modules; all else is shared."""
    if module in replacements:
        return replacements[module]
    for name, child in module._modules.items():
        if child is not None and (replaced := put_in_place(replacements, child)) is not child:
            module = _with_child(module, name, replaced)
    return module


def _with_child(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """Copy `module`, not what is in it, with another child in one place."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = {**module._modules, name: child}
    return copied


def _renamed(function: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    """Copy a function, with a code object and a qualified name of its own."""
    assert isinstance(function, types.FunctionType)
    renamed = types.FunctionType(
        function.__code__.replace(co_name=function.__code__.co_name),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    renamed.__kwdefaults__ = function.__kwdefaults__
    renamed.__annotations__ = function.__annotations__
    renamed.__dict__.update(function.__dict__)  # `__wrapped__`, by which vLLM finds the arguments
    renamed.__qualname__ = f"{function.__qualname__}_{suffix}"
    return renamed
