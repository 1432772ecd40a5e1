"""Early-exit inference: vLLM's load format `first_layers`, a checkpoint's first layers as a model.

`vllm serve MODEL --load-format first_layers --hf-overrides '{"num_hidden_layers": 6}'` serves what
`exit_layer=6` drafts with. vLLM builds a model of 6 layers by itself; its loaders refuse the other
layers' weights. `plugin` registers it when vLLM's loaders are imported; runs in the worker.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable

import torch
from torch import nn
from typing_extensions import override
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import DefaultModelLoader

from layerskip_vllm.checkpoint.weight_shares import layer_of_weight

LOAD_FORMAT = "first_layers"


class FirstLayersLoader(DefaultModelLoader):
    """Reads a checkpoint in the Hugging Face layout without the layers that the model has not."""

    def __init__(self, load_config: LoadConfig):
        """Read as vLLM's `auto` does; raises `ValueError` for options that it does not know."""
        load_config = copy.copy(load_config)
        load_config.load_format = "auto"
        super().__init__(load_config)

    @override
    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor]]:
        num_layers = model_config.get_total_num_hidden_layers()
        return keep_first_layers(super().get_all_weights(model_config, model), num_layers)


def keep_first_layers(
    weights: Iterable[tuple[str, torch.Tensor]], num_layers: int
) -> Generator[tuple[str, torch.Tensor]]:
    """Yield the weights of layers [0, num_layers), and those that belong to no layer."""
    for name, weight in weights:
        layer = layer_of_weight(name)
        if layer is None or layer < num_layers:
            yield name, weight
