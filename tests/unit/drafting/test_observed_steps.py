"""What K "auto" learns of a step: the drafts that were judged, of requests that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from layerskip_vllm.config.speculative import LayerSkipConfig
from layerskip_vllm.drafting import auto_length
from layerskip_vllm.drafting.acceptance import DraftResult
from layerskip_vllm.drafting.auto_length import observe_step
from layerskip_vllm.drafting.draft_lengths import DraftLengths

K = 4


class Lengths(DraftLengths):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(K, 0.25, clock=lambda: 0.0)
        self.results: Mapping[str, DraftResult] = {}
        self.is_decode = False

    def observe(self, num_drafts: int, results: Mapping[str, DraftResult], is_decode: bool) -> None:
        super().observe(num_drafts, results, is_decode)
        self.results, self.is_decode = results, is_decode


@pytest.fixture
def lengths() -> Lengths:
    return Lengths()


@pytest.fixture
def scheduler(lengths: Lengths) -> Any:
    """Requests "a" and "b", and "json", which has a grammar."""
    config = object.__new__(LayerSkipConfig)
    config.is_length_auto = True

    class Scheduler(SimpleNamespace):
        __hash__ = object.__hash__

    requests = {
        name: SimpleNamespace(
            sampling_params=SamplingParams(), use_structured_output=name == "json"
        )
        for name in ("a", "b", "json")
    }
    scheduler = Scheduler(requests=requests, vllm_config=SimpleNamespace(speculative_config=config))
    auto_length._lengths[scheduler] = lengths  # type: ignore[index]
    return scheduler


def step(
    scheduler: Any,
    drafts: Mapping[str, int],
    sampled: Sequence[int],
    num_tokens: Mapping[str, int] | None = None,
    finished: Sequence[str] = (),
) -> None:
    """Observe a step of requests that verify so many drafts, and sample so many tokens."""
    output: Any = SimpleNamespace(
        num_scheduled_tokens={name: 1 + num for name, num in drafts.items()} | (num_tokens or {}),
        scheduled_spec_decode_tokens={n: [7] * num for n, num in drafts.items() if num},
        num_spec_tokens_to_schedule=K,
        num_invalid_spec_tokens=None,
        finished_req_ids=set(finished),
    )
    model_output: Any = SimpleNamespace(
        sampled_token_ids=[[5] * num for num in sampled],
        req_id_to_index={name: index for index, name in enumerate(drafts)},
    )
    observe_step(scheduler, output, model_output)


def test_drafts_and_what_was_accepted_are_taken_from_a_step(
    scheduler: Any, lengths: Lengths
) -> None:
    step(scheduler, {"a": 4, "b": 2}, [3, 1])
    assert lengths.results == {"a": DraftResult(4, 2), "b": DraftResult(2, 0)}
    assert lengths.is_decode


def test_prompt_shows_nothing_when_it_is_not_at_its_end(scheduler: Any, lengths: Lengths) -> None:
    step(scheduler, {"a": 4, "b": 0}, [5, 0], num_tokens={"b": 64})
    assert lengths.results == {"a": DraftResult(4, 4), "b": DraftResult(0, 0)}
    assert not lengths.is_decode


def test_step_without_tokens_is_no_news(scheduler: Any, lengths: Lengths) -> None:
    """A pooling runner, or a step that has only freed requests, samples nothing."""
    step(scheduler, {"a": 4}, [])
    assert lengths.results == {"a": DraftResult(0, 0)}


def test_drafts_that_a_grammar_leaves_out_count_as_refused(
    scheduler: Any, lengths: Lengths
) -> None:
    step(scheduler, {"json": 0}, [1])  # drafts K tokens for the next step
    step(scheduler, {"json": 1}, [2])  # of which the grammar allows the first
    assert lengths.results == {"json": DraftResult(2, 1)}
    step(scheduler, {"json": 0}, [1])
    assert lengths.results == {"json": DraftResult(1, 0)}
    step(scheduler, {"json": K}, [K + 1])
    assert lengths.results == {"json": DraftResult(K, K)}


def test_own_length_of_a_request_is_no_refusal(scheduler: Any, lengths: Lengths) -> None:
    own = {"layerskip": {"num_speculative_tokens": 1}}
    scheduler.requests["json"].sampling_params = SamplingParams(extra_args=own)
    step(scheduler, {"json": 0}, [1])
    step(scheduler, {"json": 1}, [2])
    assert lengths.results == {"json": DraftResult(1, 1)}


def test_requests_are_forgotten_when_they_have_ended_or_were_aborted(
    scheduler: Any, lengths: Lengths
) -> None:
    step(scheduler, {"a": 4, "b": 4}, [3, 2])
    assert set(lengths._acceptance._by_request) == {"a", "b"}
    del scheduler.requests["a"]  # while a step of it is in flight
    step(scheduler, {"a": 4, "b": 4}, [3, 2])
    assert lengths.results.keys() == {"b"}
    step(scheduler, {"b": 4}, [2], finished=["a"])
    assert set(lengths._acceptance._by_request) == {"b"}
    step(scheduler, {}, [], finished=["b"])
    assert not lengths._acceptance._by_request


def test_nothing_is_learned_while_k_is_not_auto(scheduler: Any, lengths: Lengths) -> None:
    scheduler.vllm_config.speculative_config.is_length_auto = False
    step(scheduler, {"a": 4}, [3])
    assert not lengths.results
