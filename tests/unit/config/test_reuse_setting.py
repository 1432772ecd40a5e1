"""`reuse_exit_states` in the speculative config, and what it cannot be set beside."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

Configure = Callable[..., Any]


def reuse(configure: Configure, value: Any, more: Any = None, **engine_args: Any) -> Any:
    settings = {"method": "layerskip", "reuse_exit_states": value, **(more or {})}
    return configure(speculative_config=settings, **engine_args).speculative_config


@pytest.mark.parametrize("value", ["auto", "on"])
def test_config_has_the_setting_when_it_is_given(configure: Configure, value: str) -> None:
    config = pickle.loads(pickle.dumps(reuse(configure, value)))
    assert config.reuse_exit_states == value
    assert f"reuse_exit_states='{value}'" in repr(config)


def test_states_are_not_reused_when_nobody_asks(configure: Configure) -> None:
    config = reuse(configure, None)
    assert config.reuse_exit_states == "off"
    assert "reuse_exit_states" not in repr(config)


@pytest.mark.parametrize("value", [True, 1, "yes", ["on"]], ids=repr)
def test_setting_is_refused_when_it_is_another_word(configure: Configure, value: Any) -> None:
    with pytest.raises(ValueError, match=r"reuse_exit_states is .*; it must be 'auto', 'o"):
        reuse(configure, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_lora", True),
        ("enable_prompt_embeds", True),
        ("data_parallel_size", 2),
        ("kv_transfer_config", {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}),
    ],
)
@pytest.mark.feature(
    "Engine", "`reuse_exit_states` with `{name}`", runners=("v1", "v2"), is_refused=True
)
def test_setting_is_refused_when_verification_needs_all_layers(
    configure: Configure, name: str, value: Any
) -> None:
    if name == "kv_transfer_config":
        from vllm.config import KVTransferConfig

        value = KVTransferConfig(**value)
    assert reuse(configure, "off", **{name: value}).reuse_exit_states == "off"
    with pytest.raises(ValueError, match=rf"reuse_exit_states is 'on' and {name} is .*leave one"):
        reuse(configure, "on", **{name: value})


def test_setting_is_refused_when_verification_is_adaptive(configure: Configure) -> None:
    with pytest.raises(ValueError, match="reuse_exit_states is 'on' and enable_adaptive_verificat"):
        reuse(configure, "on", {"enable_adaptive_verification": True})


def test_setting_is_refused_when_the_model_runs_through_transformers(configure: Configure) -> None:
    reuse(configure, "off", model_impl="transformers")
    with pytest.raises(ValueError, match="reuse_exit_states is 'auto' and model_impl is 'transfor"):
        reuse(configure, "auto", model_impl="transformers")
