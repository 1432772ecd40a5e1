"""LayerSkip's training settings: the paper's names and formulas, checked once.

The YAML's `layerskip` section becomes one; `LayerSkipTrainer` takes one.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from layerskip_vllm.checkpoint.checks import check_positive_int
from layerskip_vllm.checkpoint.entry import default_settings
from layerskip_vllm.training.decoder import DecoderParts
from layerskip_vllm.training.early_exit_loss import (
    EarlyExitLoss,
    ExitCurriculum,
    ExitScale,
    ExitTarget,
    GradualCurriculum,
    NoCurriculum,
    RotationalCurriculum,
    exit_scales,
)
from layerskip_vllm.training.layer_dropout import DepthSchedule, LayerDropoutConfig, TimeSchedule

CurriculumName = Literal["none", "rotational", "gradual"]


@dataclass(frozen=True)
class LayerSkipSettings:
    """How a model is trained for early exit. The defaults are the paper's for Llama 2 7B.

    An exit is named by its E, the number of layers that run before it, as when serving.

    Attributes:
        max_drop_prob: p_max, the last layer's probability of being skipped for a sample.
        depth_schedule: D(l), how the probability grows with depth.
        time_schedule: S(t), how it changes over training: "constant" for continued training and
            "exponential" from scratch, in the paper.
        rescale: Whether a kept layer's contribution is divided by its probability of being kept.
            Differs: the paper does not.
        e_scale: How much the exits' losses weigh against the last layer's.
        exit_scale: Their weights by depth: "sum", the paper's, or "flat".
        curriculum: Which exits have a loss at a step.
        rotation: R, the steps until an exit has a loss again, with the rotational curriculum.
        exit_layers: The E that have a loss, besides the whole model; all when None.
        target: What exits learn to predict: "labels", the paper's, or the "last_layer"'s choice.
        recompute_logits: Whether an exit's logits are computed again in the backward pass instead
            of being kept, so that memory holds one exit's at a time.
        seed: Seed of layer dropout's draws, the same on all ranks.
        exit_layer: E that the checkpoint says it drafts with; a quarter of the layers when None.
        num_speculative_tokens: K that it says it drafts with; 4 when None.

    Raises:
        ValueError: A value is out of range whatever the model.
    """

    max_drop_prob: float = 0.1
    depth_schedule: DepthSchedule = "exponential"
    time_schedule: TimeSchedule = "constant"
    rescale: bool = False
    e_scale: float = 0.2
    exit_scale: ExitScale = "sum"
    curriculum: CurriculumName = "rotational"
    rotation: int = 8
    exit_layers: tuple[int, ...] | None = None
    target: ExitTarget = "labels"
    recompute_logits: bool = True
    seed: int = 0
    exit_layer: int | None = None
    num_speculative_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_drop_prob < 1.0:
            raise ValueError(
                f"max_drop_prob is {self.max_drop_prob}; it must be at least 0 and below 1."
            )
        if not 0.0 <= self.e_scale <= 1.0:
            raise ValueError(f"e_scale is {self.e_scale}; it must be from 0 to 1.")
        for name, allowed in (
            ("depth_schedule", DepthSchedule),
            ("time_schedule", TimeSchedule),
            ("exit_scale", ExitScale),
            ("curriculum", CurriculumName),
            ("target", ExitTarget),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(get_args(allowed))}."
                )
        check_positive_int("rotation", self.rotation)
        if self.num_speculative_tokens is not None:
            check_positive_int("num_speculative_tokens", self.num_speculative_tokens)
        if self.exit_scale == "sum" and 1 in (*(self.exit_layers or ()), self.exit_layer):
            name = "exit_layer is" if self.exit_layer == 1 else "exit_layers has"
            raise ValueError(
                f"{name} 1, whose weight is 0 with exit_scale sum; choose another exit or set "
                "exit_scale to flat."
            )

    def check_fits(self, num_layers: int) -> None:
        """Checks the settings against a model.

        Args:
            num_layers: L, the model's decoder layers.

        Raises:
            ValueError: A setting is out of range for a model of L layers.
        """
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
        self._check_exit_is_trained(num_layers)

    def _check_exit_is_trained(self, num_layers: int) -> None:
        """Refuses settings whose checkpoint would draft from an exit that never has a loss."""
        exit_layer = self.draft_entry(num_layers)["exit_layer"]
        said = "" if self.exit_layer is not None else " (not set, so a quarter of the layers)"
        if self.exit_layers is not None and exit_layer not in self.exit_layers:
            raise ValueError(
                f"exit_layer is {exit_layer}{said}, which drafts and must be in exit_layers, "
                f"{list(self.exit_layers)}, to be trained."
            )

    def dropout_config(self) -> LayerDropoutConfig:
        """Returns layer dropout's part of the settings."""
        return LayerDropoutConfig(
            max_prob=self.max_drop_prob,
            depth_schedule=self.depth_schedule,
            time_schedule=self.time_schedule,
            rescale=self.rescale,
            seed=self.seed,
        )

    def make_exit_loss(self, parts: DecoderParts, num_steps: int) -> EarlyExitLoss:
        """Returns the early exit loss for a model and a training of `num_steps` steps."""
        num_layers = len(parts.layers)
        exit_layers = None if self.exit_layers is None else [e - 1 for e in self.exit_layers]
        return EarlyExitLoss(
            parts,
            exit_scales(num_layers, self.e_scale, self.exit_scale),
            self._make_curriculum(num_layers, num_steps),
            exit_layers=exit_layers,
            recompute_logits=self.recompute_logits,
            target=self.target,
        )

    def _make_curriculum(self, num_layers: int, num_steps: int) -> ExitCurriculum:
        if self.curriculum == "rotational":
            return RotationalCurriculum(num_layers, self.rotation)
        if self.curriculum == "gradual":
            return GradualCurriculum(num_layers, num_steps)
        return NoCurriculum(num_layers)

    def draft_entry(self, num_layers: int) -> dict[str, Any]:
        """Returns the `layerskip` entry of the checkpoint's `config.json`: E and K."""
        defaults = default_settings("", None, num_layers)
        return {
            "exit_layer": self.exit_layer or defaults.exit_layer.value,
            "num_speculative_tokens": self.num_speculative_tokens
            or defaults.num_speculative_tokens.value,
        }
