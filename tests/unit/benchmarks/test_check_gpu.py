"""`make check-gpu` where there is no GPU: that it goes on, ends in time, and loses no result."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import check_gpu
from benchmarks.check_gpu import Step, main, make_env, make_steps, parse_check_options, read_tests
from benchmarks.decoding.speedup import parse_options

ROOT = check_gpu.ROOT


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Has `main` run commands of Python instead of its own, given as name, code and budget."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")

    def stand_in(*commands):
        made = [
            Step(name, [sys.executable, "-c", code], budget_s, read, tmp_path / name)
            for name, code, budget_s in commands
        ]
        monkeypatch.setattr(check_gpu, "make_steps", lambda options, scratch: made)

    def read(path):
        return True, json.loads(path.read_text())

    return stand_in


def test_main_goes_on_when_a_step_fails_or_hangs(steps, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_gpu, "_LAST_WORDS_S", 3.0)
    good = f"open({str(tmp_path / 'good')!r}, 'w').write('{{\"value\": 5}}'); print('said')"
    interrupted = f"""
import time
try:
    print('begun', flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    open({str(tmp_path / "interrupted")!r}, 'w').write('{{"value": 4}}')
    raise
"""
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    steps(
        ("bad", "raise SystemExit(3)", 60),
        ("interrupted", interrupted, 2),
        ("deaf", deaf, 2),
        ("good", good, 60),
    )
    folder = tmp_path / "out"
    assert main(["--output-dir", str(folder)]) == 1
    report = json.loads((folder / "check-gpu.json").read_text())
    assert report["gpu"] == "no GPU"
    assert (report["bad"]["is_well"], report["bad"]["status"]) == (False, 3)
    assert (report["interrupted"]["is_well"], report["interrupted"]["value"]) == (False, 4)
    assert (report["deaf"]["is_well"], report["deaf"]["status"]) == (False, -9)
    assert report["deaf"]["took_s"] < 60
    assert (report["good"]["is_well"], report["good"]["value"]) == (True, 5)
    log = (folder / "check-gpu.log").read_text()
    assert "begun" in log
    assert "said" in log
    assert "its time was over" in capsys.readouterr().out


def test_main_keeps_the_other_parts_results_when_it_runs_again(steps, tmp_path):
    folder = ["--output-dir", str(tmp_path / "out")]
    steps(("first", "", 60))
    assert main(folder) == 0
    steps(("second", "", 60))
    assert main(folder) == 0
    report = json.loads((tmp_path / "out/check-gpu.json").read_text())
    assert {"first", "second"} <= report.keys()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "check-gpu.json",
        "check-gpu.log",
    }


def test_main_says_so_when_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_each_part_is_under_ten_minutes_and_its_words_mean_something(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.decoding.speedup.list_gpu_names", lambda: ["a GPU"])
    for part, names in {"tests": ["tests"], "table": ["table gpu-1b", "table gpu-8b"]}.items():
        steps = make_steps(parse_check_options([part]), tmp_path)
        assert [step.name for step in steps] == names
        assert sum(step.budget_s for step in steps) < 600
    for step in steps:
        options = parse_options(step.command[3:])
        assert options.is_acceptance_given
        assert options.engine_process
    assert [step.name for step in make_steps(parse_check_options([]), tmp_path)] == [
        "tests",
        *names,
    ]
    assert all((ROOT / path).exists() for path in check_gpu.TESTS)


def test_report_says_what_was_not_run_when_the_time_is_over(tmp_path):
    path = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--budget-s=0"]
    command += [f"--junitxml={path}", "tests/unit/tools/test_speedup_bound.py"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    is_well, results = read_tests(path)
    assert not is_well
    assert results["num_not_run"] == len(results["tests"]) > 3
    assert all("0 seconds for all tests are over" in t["why"] for t in results["tests"].values())


def test_report_has_each_tests_outcome(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b" time="1.5"/>'
        '<testcase classname="a" name="c" time="0"><failure message="no">trace</failure></testcase>'
        '<testcase classname="a" name="d" time="0"><skipped message="on a CPU"/></testcase>'
        '<testcase time="0.01"/></testsuite></testsuites>'
    )
    is_well, results = read_tests(path)
    assert is_well  # whether one failed is pytest's exit status
    assert [test["outcome"] for test in results["tests"].values()] == [
        "passed",
        "failure",
        "skipped",
    ]
    assert results["tests"]["a::c"]["why"] == "no"


def test_plugin_is_found_when_nobody_has_installed_it(tmp_path, monkeypatch):
    none = importlib.metadata.EntryPoints()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: none)
    env = make_env(tmp_path)
    assert env["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert str(tmp_path) in env["PYTHONPATH"].split(":")
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert found.name == "layerskip-vllm"
    (entry,) = found.entry_points
    assert (entry.group, entry.name) == ("vllm.general_plugins", "layerskip")
    assert callable(entry.load())


def test_nothing_is_written_when_the_plugin_is_installed(tmp_path):
    assert make_env(tmp_path)["HF_HUB_OFFLINE"] == "1"
    assert not list(tmp_path.iterdir())
