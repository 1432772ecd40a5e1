"""What `layerskip-vllm tune` refuses before it starts an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from layerskip_vllm.tools.commands import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "0"], "batch_sizes is (0,); it must be different integers"),
        (["--batch-sizes", "1", "1"], "batch_sizes is (1, 1); it must be different integers"),
        (["--minutes=0"], "minutes is 0.0; it must be a number above 0"),
        (["--engine-args", '{"max_num_seqs": 8}'], "engine_args has max_num_seqs 8, but batch_siz"),
        (
            ["--speculative-config", '{"exit-layer": 4}'],
            "speculative_config has exit_layer 4, but tune chooses it; leave it out",
        ),
        (
            ["--speculative-config", '{"exit_adapter": "there"}'],
            "speculative_config has exit_adapter 'there', but tune weighs the plain exits",
        ),
        (["--write-config"], "MODEL is 'nobody/nothing', which is no folder"),
        (["--data", "nowhere.txt"], "data is 'nowhere.txt', which is not there"),
    ],
)
def test_tune_prints_one_error_when_something_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = f"--output-dir={tmp_path}"
    given = ["tune", "nobody/nothing", "--data", "stdlib", out, *arguments]
    assert main(given) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_words", "arguments", "message"),
    [
        (100, [], "data has 901 tokens; it must have at least 2048"),
        (
            500,
            ["--speculative-config", '{"lookup": "auto", "reuse_exit_states": "on"}'],
            "speculative_config has lookup 'auto' and reuse_exit_states 'on', of which",
        ),
    ],
)
def test_tune_refuses_what_does_not_fit_the_model(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    num_words: int,
    arguments: list[str],
    message: str,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the rain " * num_words)
    given = ["tune", str(checkpoint()), f"--data={text}", f"--output-dir={tmp_path}", *arguments]
    assert main(given) == 2
    assert f"error: {message}" in capsys.readouterr().err
