"""What `layerskip-vllm bench` refuses before it starts an engine."""

from __future__ import annotations

import pytest

from layerskip_vllm.tools.commands import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["humaneval"], "humaneval runs programs that the model wrote, on this machine and in no"),
        (["xsum", "--data=nowhere.jsonl"], "data is 'nowhere.jsonl'; it must be a file"),
        (["xsum", "--batch-size=0"], "batch_size is 0; it must be an integer of at least 1"),
        (["xsum", "--engine-args", '{"dtype": "half"}'], "engine_args has 'dtype', which is set"),
        (["xsum", "--num-speculative-tokens=some"], "num_speculative_tokens is 'some'; it must be"),
        (["xsum", "--num-speculative-tokens=0"], "num_speculative_tokens is 0; it must be an"),
        (["xsum", "--num-speculative-tokens=auto:0"], "num_speculative_tokens is 'auto:0'; it"),
        (
            ["xsum", "--exit-layer=2", "--speculative-config", '{"exit_layer": 4}'],
            "--exit-layer and --speculative-config['exit_layer'] are mutually exclusive",
        ),
    ],
)
def test_bench_prints_one_error_when_something_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", *arguments, "--model", "nobody/nothing"]) == 2
    assert f"error: {message}" in capsys.readouterr().err
