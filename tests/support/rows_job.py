"""Runs in a child of `engine_process`: how many rows a draft step has, and which of them draft."""

from __future__ import annotations

from typing import Any

from vllm.forward_context import get_forward_context

from tests.support.child_engines import engine
from tests.support.jobs import Server
from tests.support.scenarios import Report, Scenario


def serve_and_count_rows(scenario: Scenario) -> tuple[Report, set[int]]:
    """Serve a scenario; also returns the numbers of rows that its draft steps had."""
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        model = server.core.model_executor.driver_worker.worker.model_runner.drafter.model
        rows = set()
        model.register_forward_pre_hook(lambda _, inputs: rows.add(len(inputs[0])))
        return server.run(), rows


def serve_and_see_padding(scenario: Scenario) -> tuple[Report, list[tuple[list[bool], list[bool]]]]:
    """Serve a scenario on V2; of each draft step, which rows draft and which are called padding.

    The second is what a mixture of experts leaves out.
    """
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        worker = server.core.model_executor.driver_worker.worker
        speculator = worker.model_runner.speculator
        steps = []

        def see(_: object, inputs: tuple[object, ...]) -> None:
            drafts = speculator.idx_mapping >= 0
            is_padding = get_forward_context().is_padding
            steps.append((drafts[: len(is_padding)].tolist(), is_padding.tolist()))

        speculator.model.register_forward_pre_hook(see)
        return server.run(), steps


def serve_and_see_draft_steps(scenario: Scenario) -> tuple[Report, list[int]]:
    """Serve a scenario, on either runner; of each draft step, which of the report's steps ran it.

    Counted from 0.
    """
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        runner = server.core.model_executor.driver_worker.worker.model_runner
        drafter = getattr(runner, "drafter", None) or runner.speculator
        steps: list[int] = []
        drafter.model.register_forward_pre_hook(lambda *_: steps.append(len(server.steps) - 1))
        return server.run(), steps


def serve_and_see_preparations(scenario: Scenario) -> tuple[Report, list[int]]:
    """Serve a scenario on V1; also returns after which of the report's steps drafts are prepared.

    Counted from 0.
    """
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        drafter = server.core.model_executor.driver_worker.worker.model_runner.drafter
        prepare, steps = drafter.prepare_next_token_ids_padded, []

        def see(*args: Any) -> Any:
            steps.append(len(server.steps) - 1)
            return prepare(*args)

        drafter.prepare_next_token_ids_padded = see
        return server.run(), steps


def serve_and_count_lost_drafts(scenario: Scenario, num_ranks: int) -> tuple[int, list[bool]]:
    """Serve one request on V2, with a lookup as beside other ranks; count its steps without draft.

    Then run a step without requests, as an idle rank does; also returns which request states are
    repeating after it, if all were before.
    """
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        worker = server.core.model_executor.driver_worker.worker
        lookup = worker.model_runner.speculator.lookup
        lookup._may_leave_out = num_ranks == 1
        copy_drafts, is_lost = lookup.copy_drafts, []

        def see(tokens: Any, buffers: Any, steps: Any, idx_mapping: Any, *others: Any) -> None:
            copy_drafts(tokens, buffers, steps, idx_mapping, *others)
            has_copy = lookup._scores[0, 0] > 0
            is_lost.append(bool((idx_mapping[0] < 0) & ~has_copy))

        lookup.copy_drafts = see
        server.run()
        num_lost = sum(is_lost)
        lookup._is_repeating.fill_(True)
        worker.execute_dummy_batch()
        return num_lost, lookup._is_repeating.tolist()
