"""LayerSkip's training settings: the paper's names and formulas, checked once.

The YAML's `layerskip` section becomes one; `LayerSkipTrainer` takes one.
"""

from typing import Self

from pydantic import Field, model_validator

from layerskip_vllm.checkpoint.entry import make_entry
from layerskip_vllm.training.decoder import DecoderParts
from layerskip_vllm.training.early_exit_loss import (
    Curriculum,
    EarlyExitLoss,
    ExitScale,
    ExitTarget,
    exit_scales,
)
from layerskip_vllm.training.layer_dropout import LayerDropoutSettings


class LayerSkipSettings(LayerDropoutSettings):
    """How a model is trained for early exit. The defaults are the paper's for Llama 2 7B.

    An exit is named by its E, the number of layers that run before it, as when serving.
    """

    e_scale: float = Field(default=0.2, ge=0, le=1)
    """How much the exits' losses weigh against the last layer's."""
    exit_scale: ExitScale = "sum"
    """Their weights by depth: "sum", the paper's, or "flat"."""
    curriculum: Curriculum = "rotational"
    """Which exits have a loss at a step, besides the whole model: every R-th, by turns, more and
    more from the last down, or all with "none"."""
    rotation: int = Field(default=8, ge=1)
    """R, the steps until an exit has a loss again, with the rotational curriculum."""
    exit_layers: tuple[int, ...] | None = None
    """The E that have a loss, besides the whole model; all when not given."""
    target: ExitTarget = "labels"
    """What exits learn to predict: "labels", the paper's, or the "last_layer"'s choice."""
    recompute_logits: bool = True
    """Whether an exit's logits are computed again in the backward pass instead of being kept, so
    that memory holds one exit's at a time."""
    exit_layer: int | None = None
    """E that the checkpoint says it drafts with; a quarter of the layers when not given."""
    num_speculative_tokens: int | None = Field(default=None, ge=1)
    """K that it says it drafts with; 4 when not given."""

    @model_validator(mode="after")
    def _check_first_exit(self) -> Self:
        if self.exit_scale == "sum" and 1 in (*(self.exit_layers or ()), self.exit_layer):
            name = "exit_layer is" if self.exit_layer == 1 else "exit_layers has"
            raise ValueError(
                f"{name} 1, whose weight is 0 with exit_scale sum; choose another exit or set "
                "exit_scale to flat."
            )
        return self

    def check_fits(self, num_layers: int) -> None:
        """Refuse what is out of range for a model of L layers, and a draft exit without a loss."""
        if self.curriculum == "rotational" and self.rotation > num_layers:
            raise ValueError(
                f"rotation is {self.rotation}; it must be from 1 to {num_layers}, the model's "
                "number of layers."
            )
        exits = {f"exit_layers[{i}]": exit_ for i, exit_ in enumerate(self.exit_layers or ())}
        if self.exit_layer is not None:
            exits["exit_layer"] = self.exit_layer
        for name, value in exits.items():
            if not 1 <= value < num_layers:
                raise ValueError(
                    f"{name} is {value}; it must be from 1 to {num_layers - 1}, as the model has "
                    f"{num_layers} layers."
                )
        exit_layer = self.draft_entry(num_layers)["exit_layer"]
        if self.exit_layers is not None and exit_layer not in self.exit_layers:
            said = "" if self.exit_layer is not None else " (not set, so a quarter of the layers)"
            raise ValueError(
                f"exit_layer is {exit_layer}{said}, which drafts and must be in exit_layers, "
                f"{list(self.exit_layers)}, to be trained."
            )

    def make_exit_loss(self, parts: DecoderParts, num_layers: int | None = None) -> EarlyExitLoss:
        """Make the early exit loss for a model, of which the first `num_layers` run, or all."""
        num_layers = len(parts.layers) if num_layers is None else num_layers
        return EarlyExitLoss(
            parts,
            exit_scales(num_layers, self.e_scale, self.exit_scale),
            curriculum=self.curriculum,
            rotation=self.rotation,
            exit_layers=None if self.exit_layers is None else [e - 1 for e in self.exit_layers],
            recompute_logits=self.recompute_logits,
            target=self.target,
        )

    def draft_entry(self, num_layers: int) -> dict[str, int]:
        """Return the `layerskip` entry of the checkpoint's `config.json`: E and K."""
        return make_entry(self.exit_layer, self.num_speculative_tokens, num_layers)
