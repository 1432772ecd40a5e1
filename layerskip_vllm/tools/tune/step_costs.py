"""What steps take, from few that were timed: by exit layer, batch size and number of drafts.

Part of `layerskip-vllm tune`; plain Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Load = tuple[int, int]  # batch size, number of drafts


@dataclass(frozen=True)
class StepCosts:
    """Seconds of steps.

    A step with k drafts is taken for `rest(b, k) + k * E * layer(b)`: the verification and what a
    draft costs beside its layers, and the layers of its draft steps. The head is taken for as many
    layers as its bytes are.
    """

    num_layers: int
    head_layers: float  # the size of the head, in layers
    plain: Mapping[int, float]  # by batch size, without layerskip
    rest: Mapping[Load, float]
    layer: Mapping[int, float]  # by batch size, of a draft step

    @classmethod
    def fit(
        cls,
        num_layers: int,
        head_layers: float,
        plain: Mapping[int, float],
        timed: Mapping[int, Mapping[Load, float]],
    ) -> StepCosts:
        """Fit them to steps that were timed, by exit layer, of one or two, and by load.

        With one exit layer, which then is all that there is to predict for, its layers are in the
        rest.
        """
        exit_layers = sorted(timed)
        layer = {}
        for batch_size in plain:
            lengths = [k for b, k in timed[exit_layers[0]] if b == batch_size]
            between = exit_layers[-1] - exit_layers[0]
            squares = between * sum(k * k for k in lengths)
            slope = sum(
                k * (timed[exit_layers[-1]][batch_size, k] - timed[exit_layers[0]][batch_size, k])
                for k in lengths
            )
            layer[batch_size] = max(0.0, slope / squares) if squares else 0.0
        rest = {
            (b, k): sum(timed[e][b, k] - k * e * layer[b] for e in exit_layers) / len(exit_layers)
            for b, k in timed[exit_layers[0]]
        }
        return cls(num_layers, head_layers, plain, rest, layer)

    @property
    def loads(self) -> Sequence[Load]:
        """What was timed."""
        return list(self.rest)

    def predict(
        self,
        load: Load,
        exit_layer: int,
        vocab_share: float = 1.0,
        copy_share: float = 0.0,
        reuses: bool = False,
    ) -> float:
        """Predict a step's seconds.

        Args:
            load: Batch size and number of drafts.
            exit_layer: The layers of a draft step.
            vocab_share: The rows of the head that it reads, 0 to 1.
            copy_share: The drafts that are copies; where all of a batch are, no draft step runs.
            reuses: Whether verification begins at the exit for all drafts but the last.

        Returns:
            What a step takes.
        """
        batch_size, num_drafts = load
        layer, head = self.layer[batch_size], self.head_layers * self.layer[batch_size]
        verification = self.rest[load] - num_drafts * head
        if reuses:
            more = max(0.0, verification - self.rest[batch_size, 0])
            verification -= more * exit_layer / (self.num_layers + self.head_layers)
        drafts = num_drafts * (exit_layer * layer + vocab_share * head)
        return verification + drafts * (1 - copy_share**batch_size)

    def to_json(self) -> dict[str, Any]:
        """Return the seconds as a JSON object."""
        return {
            "plain_s": dict(self.plain),
            "draft_layer_s": dict(self.layer),
            "rest_s": [
                {"batch_size": b, "num_speculative_tokens": k, "seconds": seconds}
                for (b, k), seconds in self.rest.items()
            ],
        }
