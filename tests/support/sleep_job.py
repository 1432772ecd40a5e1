"""Runs in a child of `engine_process`: an engine that sleeps, on a GPU."""

from __future__ import annotations

from tests.support.child_engines import engine, settle
from tests.support.jobs import Server
from tests.support.scenarios import Report, Scenario


def serve_around_sleep(scenario: Scenario) -> Report:
    """Serve a scenario's requests before a new engine sleeps, and after, to the same tokens."""
    with engine(scenario) as llm:
        before = Server(llm, scenario).run()
        settle(llm)
        llm.sleep(level=1)
        llm.wake_up()
        after = Server(llm, scenario).run()
        assert after.token_ids == before.token_ids
        return after
