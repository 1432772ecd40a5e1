"""The folder of an exit adapter: what goes in comes out, and what is wrong is named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from layerskip_vllm.checkpoint.exit_adapter import (
    ExitAdapter,
    ExitAdapterConfig,
    load_exit_adapter,
    read_exit_adapter_config,
)
from tests.support.exit_adapters import make_exit_adapter

LARGE = ExitAdapterConfig(
    exit_layer=8, num_speculative_tokens=4, rank=128, hidden_size=4096, num_hidden_layers=32
)


def test_adapter_is_the_same_when_saved_and_loaded(tmp_path):
    folder = make_exit_adapter(tmp_path / "a" / "b", std=0.5, rank=4, num_speculative_tokens=6)
    loaded = load_exit_adapter(folder)
    assert (loaded.config.rank, loaded.config.num_speculative_tokens) == (4, 6)
    assert loaded.config == read_exit_adapter_config(folder)
    again = make_exit_adapter(tmp_path / "c", std=0.5, rank=4, num_speculative_tokens=6)
    for name, weight in load_exit_adapter(again).state_dict().items():
        assert weight.abs().max() > 0
        assert torch.equal(weight, loaded.state_dict()[name])


def test_adapter_has_few_bytes_when_the_model_is_large():
    adapter = ExitAdapter(LARGE)
    num_bytes = sum(weight.nbytes for weight in adapter.parameters())
    assert num_bytes == 4 * (4096 + 2 * 128 * 4096)
    assert num_bytes < 5e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_changes_no_bit_when_it_is_untrained(dtype):
    adapter = ExitAdapter(LARGE).initialize(seed=0)
    states = torch.randn(3, 4096).to(dtype)
    states[0, :2] = torch.tensor([0.0, -0.0])
    assert adapter.down.abs().max() > 0
    assert torch.equal(adapter(states), states)
    assert adapter(states).dtype == dtype


def test_adapter_scales_and_maps_when_its_weights_are_set(tmp_path):
    adapter = load_exit_adapter(make_exit_adapter(tmp_path, std=0.5))
    states = torch.randn(5, 64)
    expected = states * (1 + adapter.scale) + states @ adapter.down.T @ adapter.up.T
    torch.testing.assert_close(adapter(states), expected)


def test_adapter_has_buffers_alone_when_it_is_frozen(tmp_path):
    folder = make_exit_adapter(tmp_path, std=0.5)
    trained, frozen = load_exit_adapter(folder), load_exit_adapter(folder).freeze()
    states = torch.randn(5, 64)
    assert list(frozen.parameters()) == []
    assert {name for name, _ in frozen.named_buffers()} == {"scale", "down", "up"}
    assert torch.equal(frozen(states), trained(states))
    assert not frozen(states).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 65}, "rank is 65; it must be from 1 to 64, as the model has a hidden size of 64"),
        ({"exit_layer": 8}, "exit_layer is 8; it must be from 1 to 7, as the model has 8 layers"),
        ({"rank": True}, "rank is True; it must be an integer of at least 1"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0; it must be an integer"),
        ({"alpha": 1}, "it must have exit_layer, hidden_size"),
        ({"rank": 9}, r"weights of the shapes .*'down': \(8, 64\).* must be .*\(9, 64\)"),
    ],
)
def test_config_is_refused_when_a_value_does_not_fit(tmp_path, change, message):
    file = make_exit_adapter(tmp_path) / "exit_adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_exit_adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("exit_adapter.json", None, "has no exit_adapter.json; it must be a folder that"),
        ("exit_adapter.safetensors", None, "has no exit_adapter.safetensors"),
        ("exit_adapter.json", b"{", "exit_adapter.json is not JSON"),
        ("exit_adapter.json", b"\xff\xfe", "exit_adapter.json is not JSON"),
        ("exit_adapter.json", b"[1]", r"holds \[1\]; it must have exit_layer"),
        ("exit_adapter.safetensors", b"x" * 99, "exit_adapter.safetensors is not a safetensors"),
    ],
)
def test_folder_is_refused_when_a_file_is_not_what_it_should_be(tmp_path, name, content, message):
    file = make_exit_adapter(tmp_path) / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_exit_adapter_config(tmp_path)


def test_folder_is_refused_when_a_weight_is_missing(tmp_path):
    file = make_exit_adapter(tmp_path) / "exit_adapter.safetensors"
    save_file({"scale": torch.zeros(64)}, file)
    with pytest.raises(ValueError, match=r"holds weights of the shapes {'scale': \(64,\)}"):
        load_exit_adapter(tmp_path)
