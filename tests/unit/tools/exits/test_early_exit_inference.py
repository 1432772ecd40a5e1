"""The first E layers as a model of their own, as docs/exits.md has it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from layerskip_vllm.training.exit_head import ExitHead

EXIT_LAYER = 3
TOKEN_IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
@torch.inference_mode()
def test_first_layers_are_the_exit_when_loaded_alone_and_when_saved(
    checkpoint: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    folder = checkpoint(architecture)
    head = ExitHead(AutoModelForCausalLM.from_pretrained(folder).eval())
    expected = head.logits(head.run_layers(TOKEN_IDS)[EXIT_LAYER - 1][0])

    first = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=EXIT_LAYER)
    first.config.layerskip = None
    if getattr(first.config, "layer_types", None):
        first.config.layer_types = first.config.layer_types[:EXIT_LAYER]
    first.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)

    for model in (first, saved):
        assert len(model.model.layers) == EXIT_LAYER
        assert torch.allclose(model(TOKEN_IDS).logits[0], expected, atol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == EXIT_LAYER
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        layers = {name.split(".")[2] for name in tensors.keys() if ".layers." in name}  # noqa: SIM118
    assert layers == {"0", "1", "2"}


def test_transformers_names_the_layers_left_out_when_loaded_alone(
    checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    try:
        AutoModelForCausalLM.from_pretrained(checkpoint("llama"), num_hidden_layers=EXIT_LAYER)
    finally:
        logging.disable_propagation()
    assert re.search(r"layers\.\{3\D.*\D7\}\.mlp\.up_proj\.weight +\| UNEXPECTED", caplog.text)
