"""Training of an exit adapter: one exit of a frozen model learns to predict what the model does.

`layerskip-vllm train` uses it for a config with `exit_adapter`; so can a script, like `Trainer`.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import override

from layerskip_vllm.checkpoint.entry import make_entry
from layerskip_vllm.checkpoint.exit_adapter import (
    ExitAdapter,
    ExitAdapterConfig,
    load_exit_adapter,
    save_exit_adapter,
)
from layerskip_vllm.checkpoint.validation import Settings
from layerskip_vllm.training.decoder import capture_layer_outputs, find_decoder_parts
from layerskip_vllm.training.early_exit_loss import ExitTarget, exit_loss, next_token_labels
from layerskip_vllm.training.trainer import ResumableTrainer, check_arguments


class ExitAdapterSettings(Settings):
    """How an exit adapter is trained."""

    rank: int = Field(default=128, ge=1)
    """Rank of its low-rank map."""
    exit_layer: int | None = Field(default=None, ge=1)
    """E, its exit; a quarter of the layers when not given."""
    num_speculative_tokens: int | None = Field(default=None, ge=1)
    """K that it says it drafts; 4 when not given."""
    target: ExitTarget = "last_layer"
    """What it learns to predict: what the "last_layer" does, by which drafts are accepted, or the
    "labels", for which only the first E layers run."""

    def make_config(self, hidden_size: int, num_layers: int) -> ExitAdapterConfig:
        """Make the config of a model's adapter; `ValueError` if the settings do not fit."""
        return ExitAdapterConfig(
            **make_entry(self.exit_layer, self.num_speculative_tokens, num_layers),
            rank=self.rank,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
        )


class AdaptedExit(nn.Module):
    """One exit of a frozen model, with the adapter as all that it registers and trains.

    Called with labels it returns the exit's loss, as a model does. The model, a transformers causal
    language model without peft's adapters, needs no gradient from now on and runs in eval mode,
    whatever mode this is in. The adapter is in float32; `seed` draws its first weights.
    """

    def __init__(self, model: Any, settings: ExitAdapterSettings, seed: int) -> None:
        super().__init__()
        # The Trainer then gives `num_items_in_batch`, and counts labels as it does for a model.
        self.accepts_loss_kwargs = True
        self.loss_type = "ForCausalLM"
        if hasattr(model, "peft_config"):
            raise ValueError(
                "The model has peft's adapters, which an exit adapter is not trained beside; call "
                "merge_and_unload() first, or leave exit_adapter out."
            )
        self._parts = find_decoder_parts(model)
        model.requires_grad_(False).eval()
        config = settings.make_config(model.config.hidden_size, len(self._parts.layers))
        self._is_target_last = settings.target == "last_layer"
        self.adapter = ExitAdapter(config).initialize(seed)
        self._adapted_parts = replace(
            self._parts, norm=nn.Sequential(self._parts.norm, self.adapter)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Compute the exit's loss, and no logits.

        `input_ids` and `labels`, which are not shifted, are `[batch_size, seq_len] int64`;
        `num_items_in_batch` are the labels of the whole step, those of this batch when None.
        """
        exit_idx, last_idx = self.adapter.config.exit_layer - 1, len(self._parts.layers) - 1
        layer_indices = [exit_idx, last_idx] if self._is_target_last else [exit_idx]
        outputs = self._run_layers(
            layer_indices,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        soft_labels = self._parts.predict(outputs[last_idx]) if self._is_target_last else None
        loss: Any = exit_loss(
            self._adapted_parts,
            outputs[exit_idx],
            next_token_labels(labels),
            soft_labels,
            num_items_in_batch,
        )
        return CausalLMOutputWithPast(loss=loss)

    @torch.no_grad()
    def _run_layers(self, layer_indices: list[int], **inputs: Any) -> dict[int, torch.Tensor]:
        """Run the model as far as the last of some layers; their outputs by layer index."""

        def stop(*_: Any) -> None:
            raise _Stop

        layers = self._parts.layers
        with capture_layer_outputs(layers, layer_indices) as outputs, suppress(_Stop):
            handle = layers[layer_indices[-1]].register_forward_hook(stop)
            try:
                self._parts.decoder(**inputs, use_cache=False)
            finally:
                handle.remove()
        return outputs


class _Stop(Exception):
    """All layers that are needed have run."""


class ExitAdapterTrainer(ResumableTrainer):
    """A `Trainer` of an exit adapter.

    The model is neither changed nor saved: checkpoints and what `save_model` writes are the
    adapter's folder. Evaluation measures the adapter by what it learns. `ValueError` if the
    settings do not fit the model, or an argument has no meaning with a frozen model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        settings: ExitAdapterSettings,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, kwargs)
        check_adapter_arguments(args)
        exit_ = AdaptedExit(model, settings, args.seed)
        # The Trainer moves what the exit registers, the adapter alone.
        nn.Module.to(model, args.device)
        self.adapter = exit_.adapter
        super().__init__(model=exit_, args=args, **kwargs)

    @override
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_exit_adapter(Path(output_dir or str(self.args.output_dir)), self.adapter)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapter = load_exit_adapter(Path(resume_from_checkpoint))
        self.adapter.load_state_dict(adapter.state_dict())

    @override
    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def check_adapter_arguments(args: TrainingArguments) -> None:
    """Refuse arguments of the Trainer that have no meaning for an adapter of a frozen model."""
    for name, is_off, reason in (
        ("gradient_checkpointing", not args.gradient_checkpointing, "no layer has a gradient"),
        ("fsdp", not args.fsdp, "each process holds the model whole"),
        ("deepspeed", args.deepspeed is None, "each process holds the model whole"),
        ("neftune_noise_alpha", args.neftune_noise_alpha is None, "the model is frozen"),
    ):
        if not is_off:
            raise ValueError(
                f"{name} is {getattr(args, name)!r}; leave it out with exit_adapter: {reason}."
            )
