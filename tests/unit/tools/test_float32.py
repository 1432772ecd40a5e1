"""Engines whose tokens are compared compute float32 as IEEE has it, whatever the machine says."""

import pytest
from triton import knobs

from benchmarks.decoding import engines
from benchmarks.serving.demo import _make_server, parse_args
from layerskip_vllm.tools import engine_options
from layerskip_vllm.tools.float32 import IEEE_FLOAT32, float32_env
from layerskip_vllm.tools.verify import runs
from layerskip_vllm.tools.verify.command import VerifyConfig
from layerskip_vllm.tools.verify.engine_run import EngineJob
from tests.e2e.serving.server import environment
from tests.support.engine_process import RunnerProcess


@pytest.fixture(autouse=True)
def machine_with_tf32(monkeypatch):
    """As NVIDIA's images are set up, and a user may be."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")


def has_ieee(env):
    return IEEE_FLOAT32.items() <= env.items()


class Started(Exception):
    """What stands in for a process says with which environment it would start."""


@pytest.fixture
def start(monkeypatch):
    """Has the processes of a module not start."""

    def stand_in(module):
        def refuse(name, log_path, env):
            raise Started(env)

        monkeypatch.setattr(module, "EngineProcess", refuse)

    return stand_in


def test_triton_knows_the_variable(monkeypatch):
    monkeypatch.setenv("TRITON_F32_DEFAULT", IEEE_FLOAT32["TRITON_F32_DEFAULT"])
    assert knobs.language.fp32_default == "ieee"


@pytest.mark.parametrize(("dtype", "expected"), [("float32", True), ("bfloat16", False)])
def test_engines_of_verify_compute_in_ieee_when_the_model_is_float32(
    tmp_path, start, dtype, expected
):
    start(engine_options)
    job = EngineJob(VerifyConfig(model="m", dtype=dtype), (), {}, False, False)
    with pytest.raises(Started) as started:
        runs.run_engine("plain", job, tmp_path)
    assert has_ieee(started.value.args[0]) == expected


@pytest.mark.parametrize(("dtype", "expected"), [("float32", True), ("bfloat16", False)])
def test_engines_of_benchmarks_compute_in_ieee_when_the_model_is_float32(
    tmp_path, start, dtype, expected
):
    start(engines)
    with pytest.raises(Started) as started, engines.run_engines({"a": {"dtype": dtype}}, tmp_path):
        pass
    assert has_ieee(started.value.args[0]) == expected


@pytest.mark.parametrize(("dtype", "expected"), [("float32", True), ("bfloat16", False)])
def test_servers_of_the_demo_compute_in_ieee_when_the_model_is_float32(tmp_path, dtype, expected):
    args = parse_args(["--dtype", dtype, "--output-dir", str(tmp_path)])
    server = _make_server(args, "plain", ["vllm", "serve"])
    assert has_ieee(server._env) == expected


def test_engines_and_servers_of_tests_compute_in_ieee(tmp_path):
    assert has_ieee(RunnerProcess("v2", tmp_path)._env)
    assert has_ieee(environment())


def test_no_variable_is_set_when_the_model_is_not_float32():
    assert not float32_env("bfloat16")
