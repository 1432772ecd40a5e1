"""`layerskip-vllm verify` on a tiny checkpoint: four engines once, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerskip_vllm.tools.commands import main
from layerskip_vllm.tools.verify import runs
from layerskip_vllm.tools.verify.engine_run import EngineJob, EngineOutput

ENGINE = {
    "max_model_len": 128,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 24,
    "max_num_seqs": 64,
    "enforce_eager": True,
}
SMALL = [
    "--dtype=float32",
    "--num-prompts=6",
    "--max-tokens=16",
    "--num-prompt-tokens=16",
    "--num-samples=150",
    "--exit-layer=2",
    "--num-speculative-tokens=3",
    f"--engine-args={json.dumps(ENGINE)}",
]


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "verify.json").read_text())


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> str:
    """A vocabulary so small that few samples tell distributions apart: twice the usual logits."""
    return str(checkpoint(logit_scale=2.0))


@pytest.fixture(scope="module")
def verified(
    model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Any], Mapping[str, EngineOutput]]:
    """The command's exit status, its report, and what each engine gave."""
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_CACHE_ROOT", str(folder / "cache"))
        results: dict[str, EngineOutput] = {}
        run_engine = runs.run_engine

        def record(name: str, job: EngineJob, folder: Path) -> EngineOutput:
            results[name] = run_engine(name, job, folder)
            return results[name]

        patch.setattr(runs, "run_engine", record)
        status = main(["verify", model, *SMALL, "--output-dir", str(folder)])
    assert all((folder / f"{name}.log").exists() for name in runs.RUNS)
    return status, read_report(folder), results


@pytest.fixture
def replay(
    model: str,
    verified: tuple[int, dict[str, Any], Mapping[str, EngineOutput]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Mapping[str, EngineOutput]], tuple[int, dict[str, Any]]]:
    """Run the command with engines that give what engines gave before, some of it replaced."""

    def replay(replaced: Mapping[str, EngineOutput]) -> tuple[int, dict[str, Any]]:
        results = {**verified[2], **replaced}
        monkeypatch.setattr(runs, "run_engine", lambda name, job, folder: results[name])
        status = main(["verify", model, *SMALL, "--output-dir", str(tmp_path)])
        return status, read_report(tmp_path)

    return replay


def test_command_finds_no_loss_when_there_is_none(verified):
    """Fails by chance twice in a million runs, as each of two comparisons does once."""
    status, report, results = verified
    assert report["problems"] == []
    assert status == 0
    assert report["is_lossless"]
    comparisons = report["comparisons"]
    assert comparisons["layerskip"]["divergences"] == []
    assert 0.05 < comparisons["layerskip"]["acceptance"] < 0.95
    assert comparisons["unverified"]["acceptance"] == 1
    assert comparisons["unverified"]["p_value"] < 1e-9
    assert max(d["gap"] for d in comparisons["unverified"]["divergences"]) > 0.1
    assert results["floor"].samples != results["plain"].samples
    assert [len(sample) for sample in results["layerskip"].samples] == [150] * 4


def test_command_finds_the_loss_when_nothing_verifies_the_drafts(verified, replay):
    status, report = replay({"layerskip": verified[2]["unverified"]})
    assert status == 1
    assert not report["is_lossless"]
    greedy, sampled = report["problems"]
    assert greedy.startswith("greedy tokens are lost: ")
    assert sampled.startswith("sampled tokens have another distribution than plain vLLM's (p = ")


@pytest.mark.parametrize("is_greedy", [True, False], ids=["greedy", "sampled"])
def test_command_finds_the_loss_when_only_one_way_of_choosing_tokens_loses(
    verified, replay, is_greedy
):
    results = verified[2]
    broken, field = results["unverified"], "greedy" if is_greedy else "samples"
    status, report = replay(
        {"layerskip": replace(results["layerskip"], **{field: getattr(broken, field)})}
    )
    assert status == 1
    (problem,) = report["problems"]
    assert problem.startswith("greedy" if is_greedy else "sampled")


def test_command_says_that_it_is_blind_when_its_broken_case_is_not_seen(verified, replay):
    status, report = replay({"unverified": verified[2]["layerskip"]})
    assert status == 1
    assert len(report["problems"]) == 2
    assert all(problem.startswith("the check can't see a loss") for problem in report["problems"])


def test_command_refuses_to_judge_when_plain_vllm_differs_from_itself(verified, replay):
    status, report = replay({"floor": verified[2]["unverified"]})
    assert status == 1
    assert report["problems"][0].startswith("two runs of plain vLLM sample from different distr")


def test_command_refuses_to_judge_when_nothing_was_drafted(verified, replay):
    status, report = replay({"layerskip": verified[2]["floor"]})
    assert status == 1
    assert report["problems"] == ["nothing was drafted, so that nothing was verified"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-prompts=17"], "num_prompts is 17; without data it must be at most 16"),
        (["--num-samples=99"], "num_samples is 99; it must be an integer of at least 100"),
        (["--max-tokens=0"], "max_tokens is 0; it must be an integer of at least 1"),
        (["--engine-args", '{"seed": 1}'], "engine_args has 'seed', which is set for each run"),
        (["--engine-args", '{"dtype": "half"}'], "engine_args has 'dtype', which is set for each"),
        (["--speculative-config", '{"method": "ngram"}'], "speculative_config has method 'ngram'"),
        (["--data", "nowhere.txt"], "data is 'nowhere.txt', which is not there"),
        (
            ["--speculative-config", '{"exit_layer": 4}', "--exit-layer=6"],
            "--exit-layer and --speculative-config['exit_layer'] are mutually exclusive",
        ),
    ],
)
def test_command_prints_one_error_when_something_is_wrong(tmp_path, capsys, arguments, message):
    assert main(["verify", "model", "--output-dir", str(tmp_path), *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_command_exits_with_usage_when_an_argument_is_no_json_object(capsys):
    with pytest.raises(SystemExit) as error:
        main(["verify", "model", "--engine-args", "[1]"])
    assert error.value.code == 2
    assert "'[1]' is no JSON object" in capsys.readouterr().err


def test_command_shows_the_log_when_an_engine_does_not_start(tmp_path, capsys):
    status = main(["verify", str(tmp_path / "no-model"), "--output-dir", str(tmp_path)])
    assert status == 2
    printed = capsys.readouterr().err
    assert "error: the plain run failed; " in printed
    assert "no-model" in printed
