"""`lookup` in the speculative config, what excludes it, and what the runners refuse of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerskip_vllm.drafting.device_lookup import DeviceLookup
from layerskip_vllm.drafting.proposer import LayerSkipProposer

Speculate = Callable[..., Any]


def look_up(speculate: Speculate, lookup: Any, **settings: Any) -> Any:
    return speculate(speculative_config={"method": "layerskip", "lookup": lookup, **settings})


@pytest.mark.parametrize(("lookup", "is_on"), [("off", False), ("auto", True), (None, False)])
def test_device_keeps_all_tokens_when_lookup_is_on(
    speculate: Speculate, lookup: str | None, is_on: bool
) -> None:
    config = pickle.loads(pickle.dumps(look_up(speculate, lookup)))
    assert config.lookup == (lookup or "off")
    assert config.use_ngram() == is_on
    assert ("lookup='auto'" in repr(config)) == is_on


@pytest.mark.parametrize("value", [True, "on", 5, ["auto"]], ids=repr)
def test_setting_is_refused_when_it_is_unknown(speculate: Speculate, value: Any) -> None:
    with pytest.raises(ValueError, match=r"lookup is .*; it must be 'off' or 'auto'"):
        look_up(speculate, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft_sample_method", "probabilistic"),
        ("enable_adaptive_verification", True),
        ("reuse_exit_states", "auto"),
        ("reuse_exit_states", "on"),
    ],
)
def test_setting_is_refused_when_another_needs_what_a_draft_leaves(
    speculate: Speculate, name: str, value: Any
) -> None:
    look_up(speculate, "off", **{name: value})
    look_up(speculate, "auto", draft_sample_method="greedy")
    with pytest.raises(ValueError, match=rf"lookup is 'auto' and {name} is {value!r}, which .*"):
        look_up(speculate, "auto", **{name: value})


@pytest.mark.parametrize(
    ("lookup", "device", "is_async", "is_refused"),
    [
        ("auto", "cpu", False, False),
        ("auto", "cpu", True, True),
        ("auto", "cuda", False, True),
        ("off", "cuda", True, False),
    ],
)
def test_v1_refuses_it_when_the_host_does_not_know_the_tokens(
    lookup: str, device: str, is_async: bool, is_refused: bool
) -> None:
    drafter: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(lookup=lookup),
        device=torch.device(device),
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=is_async)),
    )
    if not is_refused:
        LayerSkipProposer._check_lookup(drafter)
        return
    with pytest.raises(ValueError, match=r"lookup is 'auto', but Model Runner V1 .* use 'off'"):
        LayerSkipProposer._check_lookup(drafter)


def test_v2_refuses_it_when_the_table_is_too_large() -> None:
    states: Any = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=SimpleNamespace(nbytes=3 << 30)),
        max_num_reqs=1024,
        max_model_len=786432,
    )
    with pytest.raises(ValueError, match=r"max_num_seqs 1024 times max_model_len 786432 .* 3.0 G"):
        DeviceLookup(states)
