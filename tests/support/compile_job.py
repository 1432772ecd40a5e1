"""Runs in a child of `engine_process`: an engine whose stages are compiled, and where from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.support.child_engines import engine
from tests.support.jobs import Server
from tests.support.scenarios import Report, Scenario


@dataclass(frozen=True)
class Compiled:
    """What the target and the drafting stage run.

    Attributes:
        report: What the engine served.
        is_compiled: Whether the target and the stage run compiled code, in this order.
        is_from_disk: Whether it was loaded instead of compiled.
        is_shared: Whether the two run the same code.
        paths: Where their artifacts lie.
    """

    report: Report
    is_compiled: tuple[bool, bool]
    is_from_disk: tuple[bool, bool]
    is_shared: bool
    paths: tuple[str, str]


def serve_compiled(scenario: Scenario) -> Compiled:
    """Serve a scenario with a new engine, and look at its compiled functions."""
    with engine(scenario) as llm:
        server = Server(llm, scenario)
        report = server.run()
        runner = server.core.model_executor.driver_worker.worker.model_runner
        drafter = getattr(runner, "drafter", None) or runner.speculator
        inner, stage = drafter.model.inner, drafter.model.stage
        target_fn, stage_fn = _compiled(inner), _compiled(stage)
        return Compiled(
            report=report,
            is_compiled=(target_fn is not None, stage_fn is not None),
            is_from_disk=(
                inner.was_aot_compile_fn_loaded_from_disk,
                stage.was_aot_compile_fn_loaded_from_disk,
            ),
            is_shared=target_fn is stage_fn,
            paths=(
                getattr(inner, "_aot_compilation_path", ""),
                getattr(stage, "_aot_compilation_path", ""),
            ),
        )


def _compiled(module: Any) -> Any:
    return vars(module).get("aot_compiled_fn")
