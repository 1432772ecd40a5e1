"""`lookup` in the speculative config, what excludes it, and what the runners refuse of it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform

from layerskip_vllm.drafting import device_lookup, lookup
from layerskip_vllm.drafting.device_lookup import DeviceLookup
from layerskip_vllm.drafting.speculator import LayerSkipSpeculator
from layerskip_vllm.drafting.v1_refusals import check_runner_v1

Speculate = Callable[..., Any]


def look_up(
    speculate: Speculate, lookup: Any, max_num_seqs: int | None = None, **settings: Any
) -> Any:
    speculative_config = {"method": "layerskip", "lookup": lookup, **settings}
    return speculate(speculative_config=speculative_config, max_num_seqs=max_num_seqs)


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
    config: Any = SimpleNamespace(
        lookup=lookup, reuse_exit_states="off", rejection_sample_method="standard"
    )
    if not is_refused:
        check_runner_v1(config, torch.device(device), is_async)
        return
    with pytest.raises(ValueError, match=r"lookup is 'auto', but Model Runner V1 .* use 'off'"):
        check_runner_v1(config, torch.device(device), is_async)


def test_v2_refuses_it_when_the_table_is_too_large() -> None:
    states: Any = SimpleNamespace(max_num_reqs=1024, max_model_len=786432)
    with pytest.raises(ValueError, match=r"max_num_seqs 1024 times max_model_len 786432 .* 3.0 G"):
        DeviceLookup(states, may_leave_out=True)


def test_config_refuses_it_when_the_table_of_a_device_would_be_too_large(
    speculate: Speculate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before vLLM allocates it; the model's context has 512 tokens."""
    num_seqs = (1 << 30) // (4 * 512)
    look_up(speculate, "auto", max_num_seqs=num_seqs + 1)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    look_up(speculate, "auto", max_num_seqs=num_seqs)
    look_up(speculate, "off", max_num_seqs=num_seqs + 1)
    with pytest.raises(ValueError, match=rf"lookup is 'auto', .* {num_seqs + 1} times max_model_"):
        look_up(speculate, "auto", max_num_seqs=num_seqs + 1)


def test_v1_drafts_when_a_request_that_takes_drafts_has_no_copy() -> None:
    copied, none = [1, 2], [-1, -1]
    assert not needs_drafts([copied, copied])
    assert needs_drafts([copied, none])
    assert not needs_drafts([copied, none], num_sampled=(2, 0))
    assert not needs_drafts([copied, none], limits=(None, 0))
    assert needs_drafts([copied, none], limits=(0, 1))


def test_ranks_draft_when_all_requests_have_copies() -> None:
    """One rank does not know whether the others draft."""
    assert needs_drafts([[1, 2], [3, 4]], data_parallel_size=2)
    batch: Any = SimpleNamespace(has_prefill=False, idx_mapping_np=[0])
    state = {
        "_may_leave_out": True,
        "_is_copied": SimpleNamespace(synchronize=lambda: None),
        "_was_repeating": torch.tensor([True]),
    }
    lookup: Any = SimpleNamespace(**state)
    assert DeviceLookup.expects_copies(lookup, batch)
    lookup._may_leave_out = False
    assert not DeviceLookup.expects_copies(lookup, batch)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_v2_leaves_draft_steps_out_when_there_is_one_rank(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    monkeypatch.setattr(
        device_lookup, "DeviceLookup", lambda _, may_leave_out: made.append(may_leave_out)
    )
    speculator: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(lookup="auto"), dp_size=num_ranks
    )
    states: Any = None
    LayerSkipSpeculator._make_lookup(speculator, states)
    assert made == [num_ranks == 1]


def needs_drafts(
    copies: list[list[int]],
    num_sampled: tuple[int, ...] = (1, 1),
    limits: tuple[int | None, ...] = (None, None),
    data_parallel_size: int = 1,
) -> bool:
    """What V1 says of two requests that take so many drafts at most."""
    return lookup.needs_drafts(
        torch.tensor(copies), torch.tensor(num_sampled), limits, data_parallel_size
    )


def test_v2_starts_without_vllms_lookup_when_it_is_off() -> None:
    """A vLLM without its kernel takes nothing from those who do not look drafts up."""
    code = """
import sys
sys.modules["vllm.v1.worker.gpu.spec_decode.ngram.speculator"] = None
import layerskip_vllm.drafting.speculator
"""
    subprocess.run([sys.executable, "-c", code], check=True)
