"""Runs in a child of `engine_process`: how often verification begins at the exit."""

from __future__ import annotations

from tests.support.child_engines import engine
from tests.support.jobs import Server
from tests.support.scenarios import Report, Scenario


def serve_and_count_verifications(scenario: Scenario) -> tuple[Report, int]:
    """Serve a scenario; also returns how many steps of the target used exit states."""
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        report = server.run()
        runner = server.core.model_executor.driver_worker.worker.model_runner
        drafter = getattr(runner, "drafter", None) or runner.speculator
        return report, drafter.verifier.num_steps


def serve_with_reload_after_a_draft(scenario: Scenario, path: str) -> Report:
    """Serve a scenario, and load another checkpoint's weights between a draft and its verification.

    Args:
        scenario: Its requests join at once.
        path: The other checkpoint.
    """
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        step, count = llm.llm_engine.step, 0

        def counted() -> object:
            nonlocal count
            count += 1
            if count == 4:
                assert server.core.scheduler.running[0].spec_token_ids
                llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            return step()

        server.engine.step = counted
        return server.run()
