"""All engine processes of a test session, and what they have served so far."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.engine_process import RunnerProcess
from tests.support.scenarios import Report, Scenario


class Engines:
    """Serves each scenario once on each runner.

    Attributes:
        expected: The runners that this session's tests run on. What one of them is asked to serve,
            the others will be too, so they start on it at once.
    """

    def __init__(self, folder: Path, expected: Collection[str] = ()):
        self.expected = expected
        self._folder = folder
        self._processes: dict[str, RunnerProcess] = {}
        self._served: dict[tuple[str, bytes], Future[Report]] = {}

    def serve(self, runner: str, *scenarios: Scenario) -> tuple[Report, ...]:
        """Serve scenarios on one runner alone, or return what they gave before."""
        futures = [self._submit(runner, scenario) for scenario in scenarios]
        return tuple(future.result() for future in futures)

    def start(self, runner: str, *scenarios: Scenario) -> None:
        """Queue scenarios that a runner will be asked to serve."""
        for scenario in scenarios:
            self._submit(runner, scenario)

    def serve_everywhere(self, runner: str, *scenarios: Scenario) -> tuple[Report, ...]:
        """Serve scenarios on all expected runners and return what one of them gave."""
        for other in self.expected:
            self.start(other, *scenarios)
        return self.serve(runner, *scenarios)

    def run(self, runner: str, job: str, *args: Any, **kwargs: Any) -> Any:
        """Run a job, a function `module:name`, in a runner's process."""
        return self.process(runner).run(job, *args, **kwargs)

    def process(self, runner: str) -> RunnerProcess:
        """The process of a runner."""
        if runner not in self._processes:
            self._processes[runner] = RunnerProcess(runner, self._folder / runner)
        return self._processes[runner]

    def stop(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.stop()

    def _submit(self, runner: str, scenario: Scenario) -> Future[Report]:
        key = (runner, pickle.dumps(scenario))
        if key not in self._served:
            self._served[key] = self.process(runner).submit("tests.support.jobs:serve", scenario)
        return self._served[key]


@dataclass(frozen=True)
class Runner:
    """One of vLLM's model runners, as a test that runs on each of them sees it."""

    name: str
    engines: Engines

    def serve(self, *scenarios: Scenario) -> tuple[Report, ...]:
        """Serve scenarios, those that ask for the same engine with one."""
        reports = self.engines.serve_everywhere(self.name, *scenarios)
        assert all(report.runner == self.name for report in reports)
        return reports

    def pair(self, scenario: Scenario) -> tuple[Report, Report]:
        """Serve a scenario with plain vLLM and with its speculation."""
        plain, drafted = self.serve(scenario.plain(), scenario)
        return plain, drafted

    def run(self, job: str, *args: Any, **kwargs: Any) -> Any:
        """Run a job, a function `module:name`."""
        return self.engines.run(self.name, job, *args, **kwargs)
