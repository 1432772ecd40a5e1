"""Runs in a child of `engine_process`: how many rows a draft step has, and which of them draft."""

from __future__ import annotations

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


def serve_and_count_draft_steps(scenario: Scenario) -> tuple[Report, int]:
    """Serve a scenario; also returns how many draft steps were run, on either runner."""
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        runner = server.core.model_executor.driver_worker.worker.model_runner
        drafter = getattr(runner, "drafter", None) or runner.speculator
        steps: list[None] = []
        drafter.model.register_forward_pre_hook(lambda *_: steps.append(None))
        return server.run(), len(steps)
