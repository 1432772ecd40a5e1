"""The exit model: what both drafters run, K times in a row, for each draft.

Made in the worker after loading, of parts of the target alone (and an exit adapter, if given).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.sequence import IntermediateTensors

from layerskip_vllm.checkpoint.exit_adapter import ExitAdapter, load_exit_adapter
from layerskip_vllm.config.speculative import get_layerskip_config
from layerskip_vllm.drafting.draft_head import DraftHead
from layerskip_vllm.drafting.exit_states import ExitStates
from layerskip_vllm.drafting.kv_transfer import without_kv_connector
from layerskip_vllm.drafting.stages import (
    FIRST_RANK,
    LAST_RANK,
    find_sliceable_model,
    layers_of,
    make_stage,
    put_in_place,
    run_as,
)


class ExitModel(nn.Module):
    """The first E layers of a target model, its final norm, an exit adapter or none, and its head.

    Of the target it registers no submodule: the parameters stay the target's alone, and
    `named_parameters` of neither model finds them twice.

    Attributes:
        target: The whole model.
        inner: The inner model, the module of it that runs the layers.
        stage: The inner model stopped after layer E.
        staged_target: The target with the stage in the inner model's place; it shares all else.
        exit_states: What drafting leaves for verification, None unless `reuse_exit_states` is set.
        first_layers: With them, the target up to layer E, without the norm.
        remaining_layers: With them, the target as it goes on from layer E.
        norm: With them, the target after its last layer: the final norm alone.
        exit_adapter: What corrects the stage's outputs for the head, None for nothing. Whole on
            every rank; its weights are buffers, which vLLM keeps through sleep of level 2, and no
            part of what a checkpoint's weights are loaded into again.
        draft_head: The rows of the head that drafts choose among, None for the target's own head.
            Copies, which vLLM may drop when the engine sleeps: they are made anew of new weights.
        attn_layer_names: The attention layers among the first E, by their names in vLLM's forward
            context; their KV cache is what draft steps read and write.
    """

    target: Any  # a vLLM model, whose methods torch's types do not know
    inner: nn.Module
    stage: nn.Module
    staged_target: nn.Module
    exit_states: ExitStates | None
    first_layers: nn.Module
    remaining_layers: nn.Module
    norm: nn.Module
    exit_adapter: ExitAdapter | None
    draft_head: DraftHead | None
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
        config = get_layerskip_config(vllm_config)
        first_modules = {
            module for layer in layers_of(inner)[:exit_layer] for module in layer.modules()
        }
        forward_context = vllm_config.compilation_config.static_forward_context
        self.attn_layer_names = {
            name
            for name, layer in forward_context.items()
            if layer in first_modules and isinstance(layer, AttentionLayerBase)
        }
        _check_attention(forward_context, self.attn_layer_names)
        # Past `nn.Module.__setattr__`, which would register them.
        self.__dict__["target"] = target
        self.__dict__["inner"] = inner
        self.__dict__["stage"] = make_stage(
            inner, range(exit_layer), vllm_config, is_eager=bool(config.enforce_eager)
        )
        self.__dict__["staged_target"] = put_in_place({inner: self.stage}, target)
        self.exit_states = None
        if config.reuse_exit_states != "off":
            self._split(exit_layer, vllm_config)
        self.exit_adapter = _load_exit_adapter(config.exit_adapter, vllm_config)
        self.draft_head = (
            DraftHead(target, config.draft_vocab, vllm_config) if config.draft_vocab else None
        )
        if self.exit_states is not None or self.draft_head is not None:
            _call_before_loading(target, self.expect_weights)
        if hasattr(target, "get_top_tokens"):
            self.get_top_tokens = target.get_top_tokens
        elif config.use_local_argmax_reduction:
            raise ValueError(
                f"use_local_argmax_reduction is true, but {type(target).__name__} has no "
                "get_top_tokens(); leave it out."
            )

    def _split(self, exit_layer: int, vllm_config: VllmConfig) -> None:
        """Make what runs a verification in two parts, and a draft step that keeps the first's."""
        num_layers = len(layers_of(self.inner))
        for name, layers, rank in (
            ("first_layers", range(exit_layer), FIRST_RANK),
            ("remaining_layers", range(exit_layer, num_layers), LAST_RANK),
            ("norm", range(num_layers, num_layers), LAST_RANK),
        ):
            stage = make_stage(self.inner, layers, vllm_config, rank, is_eager=not layers)
            self.__dict__[name] = put_in_place({self.inner: stage}, self.target)
        self.exit_states = ExitStates(self.target, vllm_config)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        keep: Callable[[IntermediateTensors], None] | None = None,
    ) -> torch.Tensor:
        """Run the first E layers, the final norm and the exit adapter.

        Args:
            input_ids: `[num_tokens] int32`.
            positions: `[num_tokens] int64`.
            inputs_embeds: Never given; vLLM's drafting code names the argument.
            keep: What takes the exit states, `[num_tokens, ...]` each, if they are to be kept.

        Returns:
            `[num_tokens, hidden_size]`, what `compute_logits` takes.
        """
        assert inputs_embeds is None
        hidden_states: torch.Tensor
        if keep is None:
            with without_kv_connector():
                hidden_states = self.staged_target(input_ids, positions, None, None)
        else:
            states = self.run_first_layers(input_ids, positions)
            keep(states)
            with run_as(LAST_RANK):
                hidden_states = self.norm(None, positions, states, None)
        if self.exit_adapter is not None:
            hidden_states = self.exit_adapter(hidden_states)
        return hidden_states

    def run_first_layers(
        self, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> IntermediateTensors:
        """Run the first E layers alone.

        Args:
            input_ids: `[num_tokens] int32`.
            positions: `[num_tokens] int64`.

        Returns:
            The exit states, `[num_tokens, ...]` each.
        """
        with run_as(FIRST_RANK):
            states: IntermediateTensors = self.first_layers(input_ids, positions, None, None)
        return states

    def run_remaining_layers(
        self, states: IntermediateTensors, positions: torch.Tensor
    ) -> torch.Tensor:
        """Run layers [E, L) and the final norm on exit states, which are of no use afterwards.

        Args:
            states: `[num_tokens, ...]` each.
            positions: `[num_tokens] int64`.

        Returns:
            `[num_tokens, hidden_size]`, what the whole target makes of the same tokens.
        """
        with run_as(LAST_RANK):
            hidden_states: torch.Tensor = self.remaining_layers(None, positions, states, None)
        return hidden_states

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
        """Apply the head: `[num_tokens, hidden_size]` to `[num_tokens, vocab_size]`.

        With a draft head there are only its tokens' logits, in its order.
        """
        head = self.target if self.draft_head is None else self.draft_head
        logits: torch.Tensor | None = head.compute_logits(hidden_states)
        return logits

    def expect_weights(self) -> None:
        """Note that the target's weights have changed, or are about to."""
        if self.exit_states is not None:
            self.exit_states.forget()
        if self.draft_head is not None:
            self.draft_head.is_stale = True

    def follow_weights(self) -> None:
        """Copy anew what is copied of the target's weights, if they have changed."""
        if self.draft_head is not None:
            self.draft_head.refresh()


def _call_before_loading(target: Any, call: Callable[[], None]) -> None:
    """Have a model call a function before it loads weights, whoever has it load them."""
    load_weights = target.load_weights

    @functools.wraps(load_weights)
    def load(*args: Any, **kwargs: Any) -> Any:
        call()
        return load_weights(*args, **kwargs)

    target.load_weights = load


def _load_exit_adapter(folder: str | None, vllm_config: VllmConfig) -> ExitAdapter | None:
    if folder is None:
        return None
    adapter = load_exit_adapter(Path(folder)).freeze()
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype)
    return adapter.to(vllm_config.device_config.device, dtype)


def _check_attention(forward_context: dict[str, Any], attn_layer_names: set[str]) -> None:
    if not attn_layer_names:
        raise ValueError("layerskip needs attention layers before the exit; the model has none.")
    for name in attn_layer_names:
        shared_with = getattr(forward_context[name], "kv_sharing_target_layer_name", None)
        if shared_with is not None:
            raise ValueError(
                f"attention layer {name} shares the KV cache of {shared_with}; layerskip cannot "
                "draft with layers that share their cache."
            )
