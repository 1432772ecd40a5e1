"""Runs in a child of `engine_process`: what an engine with an exit adapter holds of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerskip_vllm.checkpoint.weight_shares import WeightShares
from layerskip_vllm.drafting.bytes_read import share_of_bytes
from tests.support.child_engines import engine
from tests.support.scenarios import Scenario


@dataclass(frozen=True)
class Held:
    """An adapter in a worker.

    Attributes:
        weights: What the drafter's model registers as buffers, by name, as lists of numbers.
        dtypes: Of those, as strings.
        parameters: The names of what it registers as parameters.
        target_names: The names of the target's parameters and buffers.
        shares: What `share_of_bytes` gives.
    """

    weights: dict[str, Any]
    dtypes: set[str]
    parameters: tuple[str, ...]
    target_names: tuple[str, ...]
    shares: WeightShares


def hold(scenario: Scenario) -> Held:
    """Start an engine and look at its drafter."""
    with engine(scenario) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        draft, target = worker.get_draft_model(), worker.model_runner.get_model()
        weights = dict(draft.named_buffers())
        return Held(
            weights={name: weight.tolist() for name, weight in weights.items()},
            dtypes={str(weight.dtype) for weight in weights.values()},
            parameters=tuple(name for name, _ in draft.named_parameters()),
            target_names=tuple(
                name
                for named in (target.named_parameters(), target.named_buffers())
                for name, _ in named
            ),
            shares=share_of_bytes(target, draft.exit_adapter.config.exit_layer, draft.exit_adapter),
        )
