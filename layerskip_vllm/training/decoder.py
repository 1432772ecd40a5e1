"""Finds a causal language model's decoder layers and head, and reads their outputs.

All of training goes through here to a transformers model. Its own modules and `forward` are used,
so whatever a model does before its layers and after its norm is done for exits too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

LAYERS_NAMES = ("layers", "h")
NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


class _DecoderOutput(BaseModelOutput):
    """A decoder's output of hidden states alone; what else a model asks it for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder-only language model that LayerSkip works on.

    Attributes:
        model: The causal language model, without a wrapper that adds adapters to it.
        decoder: What the model's `forward` runs before its head; the layers and norm are in it.
        layers: The decoder layers, in order.
        norm: The final norm, which every exit shares.
        head: The output embeddings, which every exit shares too.
    """

    model: PreTrainedModel
    decoder: nn.Module
    layers: Sequence[nn.Module]
    norm: nn.Module
    head: nn.Module

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute an exit's logits, `[batch_size, seq_len, vocab_size]` in the head's dtype.

        From x_{l+1}, its layer's output, `[batch_size, seq_len, hidden_size]`, by the model's own
        `forward` with the decoder's work done already: so logits are scaled or capped where the
        model does that.
        """
        output = _DecoderOutput(last_hidden_state=self.norm(hidden_states))
        undo = replace_forward(self.decoder, lambda *_args, **_kwargs: output)
        try:
            logits: torch.Tensor = type(self.model).forward(self.model).logits
        finally:
            undo()
        return logits

    @torch.no_grad()
    def predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute an exit's probabilities, `[batch_size * seq_len, vocab_size] float32`."""
        return self.compute_logits(hidden_states).float().flatten(0, -2).softmax(-1)


def find_decoder_parts(model: Any) -> DecoderParts:
    """Find the parts of a transformers causal language model, one with peft's adapters too.

    `ValueError` if it is an encoder-decoder, or has no decoder layers, final norm or head.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model must be decoder-only, {name} has an encoder too.")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers: Any = _first_child(decoder, LAYERS_NAMES, nn.ModuleList)
    norm: Any = _first_child(decoder, NORM_NAMES, nn.Module)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for part, found, looked_for in (
        ("decoder layers", layers, f"a ModuleList named {' or '.join(LAYERS_NAMES)}"),
        ("final norm", norm, f"a module named {' or '.join(NORM_NAMES)}"),
        ("head", head, "output embeddings"),
    ):
        if found is None:
            raise ValueError(
                f"model must have a decoder with layers, a final norm and a head that transformers "
                f"knows; {name} has no {part}: {looked_for}."
            )
    return DecoderParts(model, model.base_model, layers, norm, head)


def _first_child(module: nn.Module, names: Iterable[str], kind: type[nn.Module]) -> Any:
    children = (getattr(module, name, None) for name in names)
    return next((child for child in children if isinstance(child, kind)), None)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Put `forward`, called without the module, in the place of a module's own.

    The function that is returned puts back what was there: the class's, or one put there before.
    """
    replaced = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if replaced is None:
            del module.forward
        else:
            module.forward = replaced

    return undo


@contextmanager
def capture_layer_outputs(
    layers: Sequence[nn.Module], layer_indices: Iterable[int]
) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the outputs of some of all `layers` while a forward pass runs inside the `with`.

    The dict fills up as layers run: layer index to x_{l+1}, `[batch_size, seq_len, hidden_size]`,
    before the final norm.
    """
    outputs: dict[int, torch.Tensor] = {}

    def make_hook(layer_idx: int) -> Callable[[nn.Module, object, Any], None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            outputs[layer_idx] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[i].register_forward_hook(make_hook(i)) for i in layer_indices]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
