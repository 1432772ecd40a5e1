"""A child process that calls functions by name: here the standard library's, no engine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerskip_vllm.tools.engine_process import EngineProcess, JobError


@pytest.fixture
def process(tmp_path: Path) -> Iterator[EngineProcess]:
    with EngineProcess("child", tmp_path / "log", timeout_s=20) as process:
        yield process


def test_jobs_share_one_child_when_none_fails(process: EngineProcess) -> None:
    pid = process.run("os:getpid")
    assert pid != os.getpid()
    assert process.run("builtins:dict", a=1) == {"a": 1}
    assert process.run("os:getpid") == pid


def test_error_holds_the_childs_traceback_when_a_job_raises(process: EngineProcess) -> None:
    pid = process.run("os:getpid")
    with pytest.raises(JobError, match=r"math:sqrt failed on child:\n[^$]*ValueError: "):
        process.run("math:sqrt", -1)
    assert "ValueError" in process.log
    assert process.run("os:getpid") == pid


def test_child_is_started_again_when_a_job_crashed_it(process: EngineProcess) -> None:
    pid = process.run("os:getpid")
    with pytest.raises(JobError, match=r"crashed the process of child[^$]*Fatal Python error: Ab"):
        process.run("os:abort")
    assert process.run("os:getpid") != pid


def test_error_says_where_a_job_hangs_when_it_takes_too_long(tmp_path: Path) -> None:
    process = EngineProcess("child", tmp_path / "log", timeout_s=2)
    with pytest.raises(JobError, match=r"took longer than 2 s on child[^$]*in serve_jobs"):
        process.run("time:sleep", 60)
    process.stop()


@pytest.mark.parametrize(("job_s", "grace_s", "ends"), [(0.5, 60, True), (60, 0, False)])
def test_child_ends_by_itself_only_when_it_is_given_time(
    tmp_path: Path, job_s: float, grace_s: float, ends: bool
) -> None:
    process, file = EngineProcess("child", tmp_path / "log"), tmp_path / "file"
    process.run("atexit:register", os.mkdir, str(file))
    running = process.submit("time:sleep", job_s)
    while not running.running():
        time.sleep(0.01)
    process.stop(grace_s)
    assert file.exists() == ends
    assert (running.exception() is None) == ends


def test_child_does_not_outlive_the_block_when_it_raises(tmp_path: Path) -> None:
    pids = []

    def interrupt() -> None:
        with EngineProcess("child", tmp_path / "log") as process:
            pids.append(process.run("os:getpid"))
            process.submit("time:sleep", 60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_child_uses_no_processor_time_when_it_waits(process: EngineProcess) -> None:
    before = process.run("time:process_time")
    time.sleep(1)
    assert process.run("time:process_time") - before < 0.1
