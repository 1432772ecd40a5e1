"""An exit adapter: the few weights by which an exit of a frozen model learns to predict.

`training` makes one, `config` checks its folder, `stages` runs it; torch alone, no vLLM.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional

from layerskip_vllm.checkpoint.entry import check_positive_int

CONFIG_FILE = "exit_adapter.json"
WEIGHTS_FILE = "exit_adapter.safetensors"


@dataclass(frozen=True)
class ExitAdapterConfig:
    """What an adapter is, and which model it belongs to.

    `ValueError` if a value is not a positive integer, or they do not go together.
    """

    exit_layer: int  # E, the one exit that it was trained for
    num_speculative_tokens: int  # K, what it drafts unless the user says otherwise
    rank: int  # of its low-rank map
    hidden_size: int
    num_hidden_layers: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_positive_int(name, value)
        for name, limit, what in (
            ("exit_layer", self.num_hidden_layers - 1, f"{self.num_hidden_layers} layers"),
            ("rank", self.hidden_size, f"a hidden size of {self.hidden_size}"),
        ):
            if getattr(self, name) > limit:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be from 1 to {limit}, as the model "
                    f"has {what}."
                )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The adapter's weights by name."""
        return {
            "scale": (self.hidden_size,),
            "down": (self.rank, self.hidden_size),
            "up": (self.hidden_size, self.rank),
        }


class ExitAdapter(nn.Module):
    """Corrects the hidden states that an exit gives to the shared head.

    With n the final norm of the exit's hidden states, the head reads
    `n + scale * n + up(down(n))`: `scale` makes the norm's weight the exit's own, `up` and `down`
    are a low-rank map. All is linear, so it means the same where a model scales its norm's output.
    With `scale` and `up` at zero, as they start, the exit is the plain one to the bit, and weight
    decay draws it there.
    """

    scale: torch.Tensor  # [hidden_size], added to 1
    down: torch.Tensor  # [rank, hidden_size]
    up: torch.Tensor  # [hidden_size, rank]

    def __init__(self, config: ExitAdapterConfig) -> None:
        super().__init__()
        self.config = config
        for name, shape in config.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def initialize(self, seed: int) -> ExitAdapter:
        """Draw `down`, so that `up` has a gradient; returns the adapter."""
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.down, std=self.config.hidden_size**-0.5, generator=generator)
        return self

    def freeze(self) -> ExitAdapter:
        """Make its weights buffers, not parameters; returns the adapter."""
        for name in self.config.shapes:
            weight = self._parameters.pop(name)
            assert weight is not None
            self.register_buffer(name, weight.detach())
        return self

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Correct an exit's hidden states after the final norm, `[..., hidden_size]`."""
        states = hidden_states.to(self.scale.dtype)
        change = states * self.scale + functional.linear(
            functional.linear(states, self.down), self.up
        )
        return hidden_states + change.to(hidden_states.dtype)


def save_exit_adapter(folder: Path, adapter: ExitAdapter) -> None:
    """Write an adapter, and nothing of its model, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous() for name, weight in adapter.state_dict().items()}
    # Not `save_file`, whose files nobody but their owner can read.
    (folder / WEIGHTS_FILE).write_bytes(save(weights, metadata={"format": "pt"}))
    text = json.dumps(asdict(adapter.config), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_exit_adapter(folder: Path) -> ExitAdapter:
    """Read an adapter to the CPU; `ValueError` as from `read_exit_adapter_config`."""
    adapter = ExitAdapter(read_exit_adapter_config(folder))
    adapter.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return adapter


def read_exit_adapter_config(folder: Path) -> ExitAdapterConfig:
    """Read what an adapter is, and check that its weights are there and have its shapes.

    `ValueError` if `save_exit_adapter` wrote no such folder, or a file is not what it should be.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"exit_adapter is {str(folder)!r}, which has no {name}; it must be a folder that "
                "`layerskip-vllm train` saved an exit adapter in."
            )
    file = folder / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    names = {field.name for field in fields(ExitAdapterConfig)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ValueError(f"{file} holds {values!r}; it must have {', '.join(sorted(names))}.")
    try:
        config = ExitAdapterConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    _check_shapes(folder / WEIGHTS_FILE, config)
    return config


def _check_shapes(file: Path, config: ExitAdapterConfig) -> None:
    try:
        with safe_open(file, framework="pt") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}.") from error
    if found != config.shapes:
        raise ValueError(
            f"{file} holds weights of the shapes {found}; by {CONFIG_FILE} they must be "
            f"{config.shapes}."
        )
