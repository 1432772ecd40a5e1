"""Virtual pipeline stages: a slice of a loaded model's layers that runs as a model of its own.

A vLLM model that supports pipeline parallelism runs layers [start_layer, end_layer) of itself. A
stage is a shallow copy of it with another end, so it shares every weight, and whatever replaces a
layer (an adapter, a weight update) replaces it in all stages. A model that vLLM runs through
transformers has no such end; its stage has a shorter list of the same layers. Built in the worker
after loading.
"""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from layerskip_vllm.checkpoint.exit_adapter import ExitAdapter, load_exit_adapter
from layerskip_vllm.drafting.kv_transfer import without_kv_connector


class ExitModel(nn.Module):
    """The first E layers of a target model, its final norm, an exit adapter or none, and its head.

    Of the target it registers no submodule: the parameters stay the target's alone, and
    `named_parameters` of neither model finds them twice.

    Attributes:
        target: The whole model.
        inner: The module of it that runs the layers.
        stage: The view of `inner` that stops after layer E.
        view: The view of `target` that runs `stage`.
        exit_adapter: What corrects the stage's outputs for the head, None for nothing. Whole on
            every rank; its weights are buffers, which vLLM keeps through sleep of level 2, and no
            part of what a checkpoint's weights are loaded into again.
        attn_layer_names: The attention layers among the first E, by their names in vLLM's forward
            context; their KV cache is what draft steps read and write.
    """

    target: nn.Module
    inner: nn.Module
    stage: nn.Module
    view: nn.Module
    exit_adapter: ExitAdapter | None
    attn_layer_names: set[str]

    def __init__(self, target: nn.Module, exit_layer: int, vllm_config: VllmConfig):
        """Slice a loaded model.

        Args:
            target: The whole model.
            exit_layer: E, the number of layers that draft.
            vllm_config: The configuration that it was built with.

        Raises:
            ValueError: If the model has no such slice, or not its attention layers alone, or if the
                exit adapter's folder is not (on this machine) what it should be.
        """
        super().__init__()
        inner = find_sliceable_model(target)
        prefix = layers_of(inner)[:exit_layer]
        attention = {module for layer in prefix for module in layer.modules()}
        forward_context = vllm_config.compilation_config.static_forward_context
        self.attn_layer_names = {
            name
            for name, layer in forward_context.items()
            if layer in attention and isinstance(layer, AttentionLayerBase)
        }
        _check_prefix(forward_context, self.attn_layer_names)
        is_eager = bool(vllm_config.speculative_config.enforce_eager)
        # Past `nn.Module.__setattr__`, which would register them.
        self.__dict__["target"] = target
        self.__dict__["inner"] = inner
        self.__dict__["stage"] = make_stage(inner, exit_layer, vllm_config, is_eager)
        self.__dict__["view"] = _replace(target, inner, self.stage)
        self.exit_adapter = _load_exit_adapter(vllm_config)
        if hasattr(target, "get_top_tokens"):
            self.get_top_tokens = target.get_top_tokens
        elif vllm_config.speculative_config.use_local_argmax_reduction:
            raise ValueError(
                f"use_local_argmax_reduction is true, but {type(target).__name__} has no "
                "get_top_tokens(); leave it out."
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the first E layers, the final norm and the exit adapter.

        Args:
            input_ids: `[num_tokens] int32`.
            positions: `[num_tokens] int64`.
            inputs_embeds: Never given; vLLM's drafting code names the argument.

        Returns:
            `[num_tokens, hidden_size]`, what `compute_logits` takes.
        """
        assert inputs_embeds is None
        with without_kv_connector():
            hidden_states = self.view(input_ids, positions, None, None)
        if self.exit_adapter is None:
            return hidden_states
        return self.exit_adapter(hidden_states)

    def load_weights(self, *_: object, **__: object) -> None:
        """Refuse weights for a draft model, which vLLM's weight transfer would send.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "layerskip has no draft weights to update: it drafts with the target's own layers. "
            "Update the target's weights alone; drafts follow at once."
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Apply the target's head: `[num_tokens, hidden_size]` to `[num_tokens, vocab_size]`."""
        return self.target.compute_logits(hidden_states)


def _load_exit_adapter(vllm_config: VllmConfig) -> ExitAdapter | None:
    folder = vllm_config.speculative_config.exit_adapter
    if folder is None:
        return None
    adapter = load_exit_adapter(Path(folder)).freeze()
    return adapter.to(vllm_config.device_config.device, vllm_config.model_config.dtype)


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
    """The decoder layers that `inner` runs."""
    return getattr(inner, str(_name_of_layers(inner)))


def _name_of_layers(inner: nn.Module) -> str | None:
    if isinstance(inner, PreTrainedModel):
        num_layers = getattr(inner.config, "num_hidden_layers", None)
    else:
        num_layers = inner.end_layer
    for name, child in inner.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return name
    return None


def make_stage(
    inner: nn.Module, end_layer: int, vllm_config: VllmConfig, is_eager: bool = False
) -> nn.Module:
    """Make a view of `inner` that runs layers [0, end_layer) and the final norm.

    Args:
        inner: The module that runs the layers, such as vLLM's `LlamaModel`.
        end_layer: Where the view stops.
        vllm_config: The configuration that `inner` was built with.
        is_eager: Whether to leave the view uncompiled where `inner` is compiled.

    Returns:
        A module that shares the submodules of `inner`, compiled on its own where `inner` is.
    """
    if isinstance(inner, PreTrainedModel):
        name = str(_name_of_layers(inner))
        stage = _with_child(inner, name, nn.ModuleList(layers_of(inner)[:end_layer]))
    else:
        stage = copy.copy(inner)  # `_modules` stays the same dict: replaced layers are seen here
        stage.end_layer = end_layer
    if getattr(inner, "do_not_compile", True):
        return stage
    if is_eager:
        stage.do_not_compile = True
        return stage
    # vLLM keys compiled code by the code object and, on disk, by its qualified name and first line.
    # Views that shared them would load one another's graphs.
    suffix = f"exit{end_layer}"
    stage.__class__ = type(
        f"{type(inner).__name__}_{suffix}",
        (type(inner),),
        {"forward": _renamed(type(inner).forward, suffix), "__module__": type(inner).__module__},
    )
    stage.__dict__.pop("aot_compiled_fn", None)
    with set_current_vllm_config(vllm_config):
        TorchCompileWithNoGuardsWrapper.__init__(stage, compile_prefix=f"layerskip_{suffix}")
    stage._compile_tag = f"layerskip_{suffix}"
    return stage


def _replace(module: nn.Module, inner: nn.Module, stage: nn.Module) -> nn.Module:
    """A view of `module` in which `stage` stands where `inner` does."""
    if module is inner:
        return stage
    for name, child in module.named_children():
        replaced = _replace(child, inner, stage)
        if replaced is not child:
            return _with_child(module, name, replaced)
    return module


def _with_child(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """A shallow copy of `module` with another child in one place."""
    view = copy.copy(module)
    view.__dict__["_modules"] = {**module._modules, name: child}
    return view


def _renamed(function: types.FunctionType, suffix: str) -> types.FunctionType:
    """A copy of `function` with a code object and a qualified name of its own."""
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


def _check_prefix(forward_context: dict[str, Any], attn_layer_names: set[str]) -> None:
    if not attn_layer_names:
        raise ValueError("layerskip needs attention layers before the exit; the model has none.")
    for name in attn_layer_names:
        shared_with = getattr(forward_context[name], "kv_sharing_target_layer_name", None)
        if shared_with is not None:
            raise ValueError(
                f"attention layer {name} shares the KV cache of {shared_with}; layerskip cannot "
                "draft with layers that share their cache."
            )
