"""transformers' Trainer with LayerSkip: exits' losses come in, all else stays its own.

`layerskip-vllm train` uses it; so can a script, in the place of `Trainer`.
"""

from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput
from typing_extensions import override

from layerskip_vllm.checkpoint.entry import CONFIG_KEY
from layerskip_vllm.training.layer_skip import LayerSkip
from layerskip_vllm.training.settings import LayerSkipSettings


class ResumableTrainer(Trainer):
    """A `Trainer` that does no step more when it is resumed from a checkpoint of its last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_EndCallback())

    @override
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, with the same arguments and result."""
        try:
            return super().train(*args, **kwargs)
        except _AlreadyTrained:
            self.is_in_train = False
            return TrainOutput(self.state.global_step, 0.0, {})


class LayerSkipTrainer(ResumableTrainer):
    """A `Trainer` that trains a causal language model for early exit.

    The logs gain `loss_exit_E` for each exit that had a loss since the last log, the whole model's
    among them; `loss` is their weighted sum. Evaluation, checkpoints and resuming are the
    Trainer's, and `config.json` gains the `layerskip` entry that serving reads E and K from. The
    model may have peft's adapters. `ValueError` if it has no decoder layers, the settings do not
    fit it, or an argument asks for a loss or a forward pass that leaves no room for exits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        settings: LayerSkipSettings,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, kwargs)
        self.layer_skip = LayerSkip(model, settings)
        if args.ddp_find_unused_parameters is None and settings.max_drop_prob > 0:
            # A layer that was skipped for a whole batch has no gradient.
            args.ddp_find_unused_parameters = True
        super().__init__(model=model, args=args, **kwargs)
        entry = settings.draft_entry(self.layer_skip.num_layers)
        setattr(self.layer_skip.model.config, CONFIG_KEY, entry)
        self._micro_batch = 0
        self._exit_totals: dict[int, torch.Tensor] = {}
        self._num_exit_steps: Counter[int] = Counter()

    @override
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, with the same arguments and result."""
        with self.layer_skip:  # before accelerate wraps the model's forward
            return super().train(*args, **kwargs)

    @override
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return a step's micro-batches, as the Trainer does; the count of them starts anew."""
        self._micro_batch = 0
        return super().get_batch_samples(*args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a micro-batch, as the Trainer does, with the draws that belong to it."""
        self.layer_skip.set_step(self.state.global_step, self.state.max_steps, self._micro_batch)
        loss = super().training_step(*args, **kwargs)
        self._micro_batch += 1
        return loss

    @override
    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the model's loss, as the Trainer does; in training that is the early exit loss.

        `num_items_in_batch` are the labels of the whole step, over all micro-batches and ranks.
        `RuntimeError` if something went around the forward pass that computes the loss.
        """
        self.layer_skip.exit_losses = {}
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.layer_skip.is_on and self.layer_skip.model.training:
            if not self.layer_skip.exit_losses:
                raise RuntimeError(
                    "The model's forward did not come through LayerSkip, so exits had no loss; "
                    "something replaced it, or there were no labels."
                )
            self._count_exit_losses(num_items_in_batch)
        return result

    def _count_exit_losses(self, num_items_in_batch: torch.Tensor | int | None) -> None:
        """Add up a micro-batch's losses, so that a step's sum is the mean over its tokens."""
        scale = 1.0 / self.current_gradient_accumulation_steps
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Divided by all ranks' tokens already: the Trainer makes up for the mean over ranks.
            num_ranks = self.accelerator.num_processes // self.get_tp_size()
            scale = float(num_ranks) if self.args.average_tokens_across_devices else 1.0
        for exit_layer, loss in self.layer_skip.exit_losses.items():
            self._exit_totals[exit_layer] = self._exit_totals.get(exit_layer, 0.0) + scale * loss
            self._num_exit_steps[exit_layer] += self._micro_batch == 0

    @override
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does; a training step's entry gains the exits' losses."""
        if "loss" in logs and self._exit_totals:
            exit_layers = sorted(self._exit_totals)
            means = torch.stack(
                [self._exit_totals[e] / self._num_exit_steps[e] for e in exit_layers]
            )
            means = self.accelerator.reduce(means, reduction="mean")
            for exit_layer, mean in zip(exit_layers, means.tolist(), strict=True):
                logs[f"loss_exit_{exit_layer}"] = mean
            self._exit_totals.clear()
            self._num_exit_steps.clear()
        super().log(logs, *args, **kwargs)


class _AlreadyTrained(Exception):
    """The checkpoint to resume from is the training's last."""


class _EndCallback(TrainerCallback):
    """Stops a training that has no steps left; the Trainer would do one more."""

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise _AlreadyTrained


def check_arguments(args: TrainingArguments, others: dict[str, Any]) -> None:
    """Refuse arguments that do not leave the loss and the forward pass to LayerSkip.

    `others` is what else the Trainer is made with, by name.
    """
    for name, needed, reason in (
        ("torch_compile", False, "layers are skipped by draws that change at every step"),
        ("use_liger_kernel", False, "its kernels replace the forward pass that has the exits"),
        ("label_smoothing_factor", 0.0, "it replaces the loss that has the exits"),
    ):
        value = getattr(args, name)
        if value != needed:
            raise ValueError(f"{name} is {value!r}; it must be {needed!r}: {reason}.")
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs has use_reentrant true, with which exits get no "
            "gradient; set it to false."
        )
    for name in ("compute_loss_func", "model_init"):
        if others.get(name) is not None:
            raise ValueError(f"{name} is given; it is of no use here, leave it out.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs, and DataParallel copies models without their "
            "exits; start one process for each with torchrun, or set CUDA_VISIBLE_DEVICES."
        )
