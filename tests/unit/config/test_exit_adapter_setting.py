"""`exit_adapter` in the speculative config: E and K come from it; what does not fit is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.exit_adapters import make_exit_adapter
from tests.unit.model_configs import NUM_LAYERS

Speculate = Callable[..., Any]


def adapt(speculate: Speculate, folder: Any, **settings: Any) -> Any:
    return speculate(speculative_config={"method": "layerskip", "exit_adapter": folder, **settings})


def test_exit_layer_and_tokens_come_from_the_adapter_when_not_given(
    speculate: Speculate, tmp_path: Path
) -> None:
    folder = str(make_exit_adapter(tmp_path, exit_layer=3, num_speculative_tokens=5))
    config = adapt(speculate, folder)
    assert (config.exit_layer, config.num_speculative_tokens) == (3, 5)
    assert config.exit_layer_source == config.num_speculative_tokens_source == "the exit adapter"
    assert config.exit_adapter == folder
    assert repr(folder) in repr(config)
    received = pickle.loads(pickle.dumps(config))
    assert received.exit_adapter == folder


def test_given_settings_are_taken_when_they_agree_with_the_adapter(
    speculate: Speculate, tmp_path: Path
) -> None:
    folder = str(make_exit_adapter(tmp_path, exit_layer=3))
    config = adapt(speculate, folder, exit_layer=3, num_speculative_tokens=7)
    assert (config.exit_layer, config.num_speculative_tokens) == (3, 7)
    assert config.exit_layer_source == config.num_speculative_tokens_source == "the user"


def test_folder_is_found_by_every_process_when_it_is_relative(
    speculate: Speculate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_exit_adapter(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert adapt(speculate, "adapter").exit_adapter == str(tmp_path / "adapter")


def test_config_has_no_adapter_when_none_is_given(speculate: Speculate) -> None:
    config = speculate(speculative_config={"method": "layerskip", "exit_adapter": None})
    assert config.exit_adapter is None
    assert "exit_adapter" not in repr(config)


@pytest.mark.parametrize(
    ("sizes", "settings", "parts"),
    [
        ({}, {"exit_layer": 3}, ["exit_layer is 3", "was trained for exit_layer 2", "leave"]),
        (
            {"hidden_size": 32},
            {},
            ["trained for a model whose hidden_size is 32", "has 64; it must be the model's own"],
        ),
        (
            {"num_hidden_layers": 12},
            {},
            ["whose num_hidden_layers is 12", f"has {NUM_LAYERS}; it must be the model's own"],
        ),
        ({}, {"exit_layer": 0}, ["exit_layer is 0", "must be an integer of at least 1"]),
    ],
    ids=str,
)
def test_adapter_is_refused_when_it_does_not_fit(
    speculate: Speculate,
    tmp_path: Path,
    sizes: dict[str, Any],
    settings: dict[str, Any],
    parts: list[str],
) -> None:
    folder = make_exit_adapter(tmp_path, **sizes)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the parts say which)
        adapt(speculate, str(folder), **settings)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "exit_adapter is 5; it must be the path of a folder"),
        (True, "exit_adapter is True; it must be the path of a folder"),
        ("/nowhere", "exit_adapter is '/nowhere', which has no exit_adapter.json"),
        ("", "which has no exit_adapter.json"),
    ],
)
def test_adapter_is_refused_when_it_is_no_folder_of_one(
    speculate: Speculate, given: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(speculate, given)


def test_adapter_is_refused_when_the_method_is_another(speculate: Speculate) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 3, "exit_adapter": "folder"}
    with pytest.raises(ValueError, match="exit_adapter is a setting of layerskip alone; add"):
        speculate(speculative_config=config)
