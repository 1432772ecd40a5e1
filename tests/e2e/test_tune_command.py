"""`layerskip-vllm tune`: real engines on a tiny checkpoint, for a short time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from layerskip_vllm.tools.commands import main
from tests.e2e.test_bench_command import CACHE, ENGINE

WORDS = ("rain", "and", "wind", "on", "the", "hills", "of", "a", "far", "country", "where", "none")


def test_tune_writes_settings_that_were_tried_when_run_for_a_short_time(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint("llama", max_position_embeddings=512), model)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS[n * n % len(WORDS)] for n in range(900)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_CACHE_ROOT", str(CACHE))
        arguments = [str(model), f"--data={text}", f"--output-dir={out}", "--minutes=0.1"]
        arguments += ["--batch-sizes", "1", "3", "--dtype=float32", "--write-config"]
        arguments += [f"--engine-args={json.dumps(ENGINE)}"]
        status = main(["--debug", "tune", *arguments])
    report = json.loads((out / "tune.json").read_text())
    (trial,) = report["trials"]
    assert {each["batch_size"] for each in trial["measured"]} == {1, 3}
    assert all(each["speedup"] > 0 for each in trial["measured"])
    # Seven exits, three sizes of the draft vocabulary, alone, with lookup or with reuse.
    assert len(report["predictions"]) == 7 * 3 * 3
    assert report["step_costs"]["plain_s"]["1"] > 0
    assert (out / "tune.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "63 ways to draft were weighed; the best 1 are tried" in printed
    entry = json.loads((model / "config.json").read_text()).get("layerskip")
    file = out / "speculative_config.json"
    # Whether drafts pay in so small a model hangs on the machine.
    assert status == (0 if report["speculative_config"] else 1)
    if status == 0:
        settings = json.loads(file.read_text())
        assert settings == report["speculative_config"]
        assert settings["method"] == "layerskip"
        assert settings["exit_layer"] == trial["exit_layer"] == entry["exit_layer"]
    else:
        assert entry is None
        assert not file.exists()
