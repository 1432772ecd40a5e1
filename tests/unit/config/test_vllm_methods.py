"""vLLM's own speculative methods, with the plugin installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def methods(write_model: Callable[..., str]) -> dict[str, dict[str, Any]]:
    return {
        "none": {},
        "ngram": {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 4,
            }
        },
        "draft_model": {
            "speculative_config": {
                "method": "draft_model",
                "model": write_model("llama", num_hidden_layers=2),
                "num_speculative_tokens": 3,
            }
        },
        "eagle": {
            "speculative_config": {
                "method": "eagle",
                "model": write_model("eagle"),
                "num_speculative_tokens": 2,
            }
        },
        "flags": {"spec_method": "ngram", "spec_tokens": 2},
    }


@pytest.mark.parametrize("name", ["none", "ngram", "draft_model", "eagle", "flags"])
def test_method_of_vllm_is_configured_as_without_the_plugin_when_it_is_installed(
    speculate: Callable[..., Any],
    methods: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    from vllm.config import SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

    hooked = speculate(**methods[name])
    original = EngineArgs.create_speculative_config.__wrapped__
    monkeypatch.setattr(EngineArgs, "create_speculative_config", original)
    plain = speculate(**methods[name])
    if name == "none":
        assert hooked is plain is None
    else:
        assert type(hooked) is type(plain) is SpeculativeConfig
        assert _values(hooked) == _values(plain)


@pytest.mark.parametrize(
    "engine_args",
    [
        {"speculative_config": {}},
        {"speculative_config": {"method": "lookahead", "num_speculative_tokens": 2}},
        {"spec_tokens": 3},
    ],
    ids=["empty", "unknown method", "tokens alone"],
)
def test_vllm_refuses_in_its_own_words_when_layerskip_is_not_asked_for(
    speculate: Callable[..., Any], engine_args: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="validation error for SpeculativeConfig"):
        speculate(**engine_args)


def _values(config: Any) -> dict[str, Any]:
    """The fields that compare by value; of a draft model's config its model."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    draft = values.pop("draft_model_config")
    for name in ("target_model_config", "target_parallel_config", "draft_parallel_config"):
        values.pop(name)
    return values | {"draft": draft and (draft.model, draft.architectures)}
