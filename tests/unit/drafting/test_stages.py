"""What a loaded model must have for its first layers to be run alone."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn


class Sliced(nn.Module):
    """A model whose forward runs a slice of its layers, like vLLM's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.start_layer, self.end_layer = 0, 2

    def forward(self, hidden_states: Any) -> Any:
        for layer in self.layers[self.start_layer : self.end_layer]:
            hidden_states = layer(hidden_states)
        return hidden_states


class Unsliced(Sliced):
    def forward(self, hidden_states: Any) -> Any:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class Inherited(Sliced):
    """Adds nothing of its own, like vLLM's Mistral."""

    def forward(self, hidden_states: Any) -> Any:
        return super().forward(hidden_states)


class InheritedUnsliced(Unsliced):
    def forward(self, hidden_states: Any) -> Any:
        return super().forward(hidden_states)


class Target(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


@pytest.mark.parametrize("kind", [Sliced, Inherited])
def test_model_is_found_when_one_module_runs_a_slice_of_its_layers(kind: type[Sliced]) -> None:
    from layerskip_vllm.drafting.stages import find_sliceable_model, layers_of

    sliced = kind()
    assert find_sliceable_model(Target(Unsliced(), InheritedUnsliced(), sliced)) is sliced
    assert layers_of(sliced) is sliced.layers


@pytest.mark.parametrize(
    ("parts", "found"),
    [([Unsliced], "none"), ([Sliced, Sliced], "Sliced, Sliced")],
    ids=["none", "two"],
)
def test_model_is_refused_when_it_has_not_one_module_that_slices(
    parts: list[type[nn.Module]], found: str
) -> None:
    from layerskip_vllm.drafting.stages import find_sliceable_model

    with pytest.raises(ValueError, match=rf"model Target must have one.*found: {found}\."):
        find_sliceable_model(Target(*[part() for part in parts]))


def test_model_is_refused_when_no_attention_layer_comes_before_the_exit() -> None:
    from layerskip_vllm.drafting.exit_model import _check_attention

    with pytest.raises(ValueError, match="needs attention layers before the exit"):
        _check_attention({}, set())


def test_model_is_refused_when_a_layer_before_the_exit_shares_its_kv_cache() -> None:
    from layerskip_vllm.drafting.exit_model import _check_attention

    own, shared = nn.Identity(), nn.Identity()
    shared.kv_sharing_target_layer_name = "layers.0.attn"
    layers = {"layers.0.attn": own, "layers.1.attn": shared}
    _check_attention(layers, {"layers.0.attn"})
    with pytest.raises(ValueError, match=r"layers\.1\.attn shares the KV cache of layers\.0\.attn"):
        _check_attention(layers, set(layers))


def test_draft_weights_are_refused_because_there_are_none() -> None:
    from layerskip_vllm.drafting.exit_model import ExitModel

    with pytest.raises(ValueError, match=r"no draft weights .* Update the target's weights alone"):
        ExitModel.load_weights(nn.Identity(), [])
