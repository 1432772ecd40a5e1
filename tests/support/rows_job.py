"""Runs in a child of `engine_process`: how many rows a draft step has."""

from __future__ import annotations

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
