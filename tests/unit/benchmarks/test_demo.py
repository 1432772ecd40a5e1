"""The demo's command line, the commands it runs, and the versions of the tools."""

import re
import sys
from pathlib import Path

import pytest

from benchmarks.serving.client import Completion, Round
from benchmarks.serving.comparison import compare_rounds
from benchmarks.serving.demo import main, parse_args
from benchmarks.serving.vllm_command import (
    LAYERSKIP,
    PLAIN,
    build_commands,
    build_env,
    resolve_vllm,
)
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters
from tests.unit.benchmarks.test_comparison import SETTING

ROOT = Path(__file__).resolve().parents[3]


def test_parse_args_passes_on_what_follows_the_dashes():
    args = parse_args(["--rounds", "1", "--", "--enforce-eager", "--seed=3"])
    assert args.rounds == 1
    assert args.vllm_args == ["--enforce-eager", "--seed=3"]


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many", ""])
def test_parse_args_names_option_and_value_when_a_number_is_wrong(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args([f"--concurrency={value}"])
    message = capsys.readouterr().err
    assert "--concurrency" in message
    assert f"{value!r}; it must be an integer of at least 1" in message


def test_parse_args_takes_several_numbers_of_requests():
    assert parse_args([]).concurrency == [1, 8]
    assert parse_args(["--concurrency", "2", "4", "16"]).concurrency == [2, 4, 16]


def test_main_names_the_model_when_it_does_not_exist(capsys, tmp_path):
    status = main(["--model", "./no-such-folder", "--output-dir", str(tmp_path)])
    assert status == 2
    assert "--model is './no-such-folder', which is no folder" in capsys.readouterr().out


def test_main_names_the_limit_when_there_are_too_few_prompts(capsys):
    assert main(["--num-prompts", "1000000"]) == 2
    assert "num_prompts must be at most" in capsys.readouterr().out


@pytest.mark.parametrize(("layerskip_ids", "status"), [((1, 2, 3), 0), ((1, 2, 9), 1)])
def test_main_says_the_headline_and_exits_with_1_when_a_token_differs(
    layerskip_ids, status, capsys, tmp_path, monkeypatch
):
    def run(args, console):
        rounds = [
            [Round((Completion(token_ids, 0.1, 0.5),), duration_s=1.0)]
            for token_ids in ((1, 2, 3), layerskip_ids)
        ]
        counters = SpecDecodeCounters(1, 2, 1, (1, 0))
        return [compare_rounds(1, *rounds, counters)], SETTING

    monkeypatch.setattr("benchmarks.serving.demo.run", run)
    assert main(["--output-dir", str(tmp_path)]) == status
    headline = capsys.readouterr().out.splitlines()[0]
    assert headline.startswith("one request: 1.00 times plain vLLM (3 against 3 tokens a second)")
    assert headline.endswith("all 3 tokens the same") == (status == 0)
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", "demo.png"}


def test_commands_differ_in_the_speculative_flags_alone():
    commands = build_commands("m", "float32", 4, 6, ["--enforce-eager"])
    plain, layerskip = commands[PLAIN], commands[LAYERSKIP]
    assert plain[:3] == ["vllm", "serve", "m"]
    assert "--enforce-eager" in plain
    assert layerskip[: len(plain)] == plain
    assert layerskip[len(plain) :] == [
        "--speculative-model=layerskip",
        "--num-speculative-tokens=6",
        "--spec-exit-layer=4",
    ]


def test_commands_leave_out_what_the_checkpoint_says_itself():
    assert build_commands("m", "float32")[LAYERSKIP][-1] == "--speculative-model=layerskip"


def test_env_of_the_plain_server_loads_no_plugin(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    plain = build_env(PLAIN, str(tmp_path), is_gpu=False)
    layerskip = build_env(LAYERSKIP, str(tmp_path), is_gpu=False)
    assert plain["VLLM_PLUGINS"] == ""
    assert {key: plain[key] for key in plain if key != "VLLM_PLUGINS"} == layerskip
    assert plain["HF_HUB_OFFLINE"] == "1"


def test_env_preloads_openmp_on_the_cpu_alone(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    openmp = str(tmp_path / "lib" / "libiomp5.so")
    assert build_env(PLAIN, "m", is_gpu=False)["LD_PRELOAD"] == f"other.so:{openmp}"
    assert build_env(PLAIN, "m", is_gpu=True)["LD_PRELOAD"] == "other.so"


def test_resolve_vllm_needs_no_script_beside_this_python(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert resolve_vllm(["vllm", "serve", "m"]) == [
        "/nowhere/python",
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        "m",
    ]


def test_pre_commit_has_the_versions_that_the_setup_installs():
    pinned = set((ROOT / "scripts" / "constraints.txt").read_text().splitlines())
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    found = re.findall(r"additional_dependencies: \[(.*)\]", text)
    assert found
    assert set(found) <= pinned


@pytest.mark.parametrize(
    ("cores", "is_gpu", "given", "expected"),
    [
        ({0, 1, 2, 3}, False, None, "1"),
        ({0, 1, 2, 3}, True, None, None),
        ({0}, False, None, None),
        ({0, 1, 2, 3}, False, "4", "4"),
    ],
)
def test_env_leaves_a_core_to_the_server_on_the_cpu_alone(
    cores, is_gpu, given, expected, monkeypatch
):
    name = "VLLM_CPU_NUM_OF_RESERVED_CPU"
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
    assert build_env(LAYERSKIP, "m", is_gpu=is_gpu).get(name) == expected


@pytest.mark.parametrize(
    ("cores", "expected"), [({4, 7}, ["4", "7"]), ({0, 1, 2}, [None, None]), ({0}, [None, None])]
)
def test_env_gives_each_server_a_core_where_there_are_two(cores, expected, monkeypatch):
    name = "VLLM_CPU_OMP_THREADS_BIND"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
    assert [build_env(server, "m", False).get(name) for server in (PLAIN, LAYERSKIP)] == expected
