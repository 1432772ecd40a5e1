"""Which tokens of a verification have exit states, and whose they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

MAX_NUM_REQS, K = 4, 3


@pytest.fixture
def states(configure: Any) -> Any:
    """Those of a draft of K steps of a, b and c; a state says its step and its row."""
    from vllm.sequence import IntermediateTensors

    from layerskip_vllm.drafting.exit_states import ExitStates

    config = configure(
        max_num_seqs=MAX_NUM_REQS,
        max_num_batched_tokens=512,
        speculative_config={"method": "layerskip", "num_speculative_tokens": K},
    )
    made = lambda n, **_: IntermediateTensors({"hidden_states": torch.zeros(n, 1)})  # noqa: E731
    target = SimpleNamespace(make_empty_intermediate_tensors=lambda n, *_: made(n))
    states = ExitStates(target, config)
    for step in range(K):
        tensor = torch.tensor([[10.0 * step + row] for row in range(MAX_NUM_REQS + 1)])  # padded
        states.keep(step, IntermediateTensors({"hidden_states": tensor}))
    states.expect({"a": 0, "b": 1, "c": 2}, K)
    return states


def take(states: Any, **requests: tuple[int, int]) -> dict[int, float]:
    """Take the states of a step: requests' numbers of tokens and of drafts. By token, the state."""
    num_tokens, num_drafts = zip(*requests.values(), strict=True)
    kept = states.take(list(requests), np.array(num_tokens, dtype=np.int32), num_drafts)
    tensor = states.tensors["hidden_states"]
    return {int(token): tensor[row].item() for token, row in zip(kept.tokens, kept.rows)}  # noqa: B905


def test_all_tokens_but_the_last_have_states_when_a_request_verifies_its_draft(states: Any) -> None:
    assert take(states, a=(4, 3), b=(3, 2)) == {0: 0, 1: 10, 2: 20, 4: 1, 5: 11}


def test_states_are_the_requests_own_when_rows_have_changed(states: Any) -> None:
    assert take(states, c=(4, 3), a=(2, 1)) == {0: 2, 1: 12, 2: 22, 4: 0}


@pytest.mark.parametrize(
    "request_",
    [(1, 0), (7, 0), (5, 3), (5, 4)],
    ids=["no draft", "prompt", "more than its draft", "more than was drafted"],
)
def test_a_request_has_none_when_its_tokens_are_not_those_of_its_draft(
    states: Any, request_: tuple[int, int]
) -> None:
    assert take(states, b=request_, c=(2, 1)) == {request_[0]: 2}


def test_a_request_has_none_when_it_was_not_in_the_batch_that_drafted(states: Any) -> None:
    assert take(states, d=(4, 3), a=(2, 1)) == {4: 0}


def test_no_request_has_any_when_a_step_has_taken_them(states: Any) -> None:
    take(states, a=(4, 3))
    assert take(states, a=(4, 3), b=(4, 3)) == {}


def test_no_request_has_any_when_weights_have_changed(states: Any) -> None:
    from layerskip_vllm.drafting.exit_model import ExitModel

    model = SimpleNamespace(exit_states=states, draft_head=None)
    ExitModel.expect_weights(model)  # type: ignore[arg-type]
    assert take(states, a=(4, 3)) == {}


def test_states_are_in_the_tokens_order_when_some_are_made(states: Any) -> None:
    from vllm.sequence import IntermediateTensors

    kept = states.take(["a", "d"], np.array([3, 2], dtype=np.int32), [2, 0])
    made = IntermediateTensors({"hidden_states": torch.tensor([[-1.0], [-2.0], [-3.0], [99.0]])})
    merged = states.merge(kept, made, torch.tensor([2, 3, 4]))
    assert merged["hidden_states"].flatten().tolist() == [0, 10, -1, -2, -3]


def test_model_is_refused_when_it_runs_through_transformers(configure: Any) -> None:
    from transformers import LlamaConfig, LlamaModel

    from layerskip_vllm.drafting.stages import FIRST_RANK, make_stage

    inner = LlamaModel(LlamaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=8))
    config = configure(speculative_config={"method": "layerskip", "reuse_exit_states": "auto"})
    with pytest.raises(ValueError, match="reuse_exit_states is 'auto', but LlamaModel runs throug"):
        make_stage(inner, range(1), config, FIRST_RANK)
