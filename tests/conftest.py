"""Fixtures that more than one folder of tests uses; nothing here imports vLLM."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: small models lose time with more, above all beside other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.checkpoints import make_checkpoint
from tests.support.engine_process import TESTED_RUNNERS
from tests.support.engines import Engines, Runner

_START_S = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the time budget of `benchmarks.check_gpu`."""
    parser.addoption("--budget-s", type=float, help="run no test that would start later")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would start after the budget's end."""
    budget_s = item.config.getoption("--budget-s")
    if budget_s is not None and time.monotonic() - _START_S > budget_s:
        pytest.skip(f"not run: the {budget_s:g} seconds for all tests are over")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny random checkpoint, made once a session for each set of `make_checkpoint` arguments."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(architecture: str = "llama", **arguments: Any) -> Path:
        name = "-".join([architecture, *(f"{k}={v}" for k, v in sorted(arguments.items()))])
        return make_checkpoint(root / name.replace("/", "_"), architecture, **arguments)

    return make


@pytest.fixture(scope="session")
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """The processes that run engines, one for each model runner, started when first used."""
    expected = {
        item.callspec.params["runner"]
        for item in request.session.items
        if "runner" in getattr(getattr(item, "callspec", None), "params", {})
    }
    engines = Engines(tmp_path_factory.mktemp("engines"), sorted(expected))
    yield engines
    engines.stop()


@pytest.fixture(scope="session", params=TESTED_RUNNERS)
def runner(request: pytest.FixtureRequest, engines: Engines) -> Runner:
    """Each of vLLM's model runners; pytest runs all tests of one before those of the other."""
    return Runner(request.param, engines)
