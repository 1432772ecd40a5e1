"""`layerskip-vllm exits`, in this process, on tiny checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from layerskip_vllm.tools.commands import main

SMALL = [
    "--seq-len=32",
    "--max-held-out-tokens=128",
    "--num-prompts=4",
    "--num-prompt-tokens=16",
    "--max-tokens=24",
    "--max-num-speculative-tokens=3",
    "--device=cpu",
]


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint that may be written to, and text to measure it on."""
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    return tmp_path


def test_command_writes_all_that_it_promises_when_run(folder, capsys):
    model, out = folder / "model", folder / "new" / "out"
    before = json.loads((model / "config.json").read_text())

    arguments = ["exits", str(model), "--data", str(folder / "text.txt"), *SMALL]
    status = main([*arguments, "--output-dir", str(out), "--write-config"])

    printed = capsys.readouterr().out
    written = json.loads((out / "exits.json").read_text())
    best = max(
        (draft["speedup"], -exit_["exit_layer"], -draft["num_speculative_tokens"])
        for exit_ in written["exits"]
        for draft in exit_["drafts"]
    )
    entry = {"exit_layer": -best[1], "num_speculative_tokens": -best[2]}
    assert status == 0
    assert best[0] > 1
    assert [len(exit_["drafts"]) for exit_ in written["exits"]] == [3] * 7 + [0]
    assert written["setting"]["data"] == [str(folder / "text.txt")]
    assert written["layerskip"] == entry
    assert json.loads((model / "config.json").read_text()) == {**before, "layerskip": entry}
    assert (out / "exits.png").read_bytes().startswith(b"\x89PNG")
    assert f"Exit after layer {-best[1]} of 8, draft" in printed
    assert "K = 3" in printed
    assert "perplexity" in printed


def test_command_leaves_the_checkpoint_alone_when_not_told_to_write(folder):
    before = (folder / "model" / "config.json").read_bytes()
    arguments = ["exits", str(folder / "model"), "--data", str(folder / "text.txt"), *SMALL]
    assert main([*arguments, "--output-dir", str(folder)]) == 0
    assert (folder / "model" / "config.json").read_bytes() == before


def test_command_leaves_the_checkpoint_alone_when_no_exit_pays(folder, checkpoint, capsys):
    # A head so large that no draft pays for it, and a random model that accepts few.
    model = folder / "wide"
    shutil.copytree(checkpoint("llama", vocab_size=16384, hidden_size=32), model)
    before = (model / "config.json").read_bytes()
    arguments = ["exits", str(model), "--data", str(folder / "text.txt"), *SMALL]
    status = main([*arguments, "--output-dir", str(folder), "--write-config"])
    assert status == 1
    assert "No exit pays" in capsys.readouterr().out
    assert (model / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-prompts=0"], "num_prompts is 0; it must be an integer of at least 1"),
        (["--seq-len=1000"], "seq_len is 1000; it must be at most 512"),
        (["--max-tokens=500"], "num_prompt_tokens and max_tokens are 16 and 500; together"),
        (["--data", "nowhere.txt"], "data is 'nowhere.txt', which is not there"),
        (["--device=tape"], "device is 'tape'"),
        (["--num-prompts=1000"], "num_prompts is 1000, but data has tokens for"),
    ],
)
def test_command_prints_one_error_when_something_is_wrong(folder, capsys, arguments, message):
    given = ["exits", str(folder / "model"), "--data", str(folder / "text.txt"), *SMALL]
    status = main([*given, "--output-dir", str(folder), *arguments])
    assert status == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--num-prompts=many"], ["--dtype=int4"], []])
def test_command_exits_with_usage_when_an_argument_is_of_no_kind(folder, capsys, arguments):
    data = ["--data", str(folder / "text.txt")] if arguments else []
    with pytest.raises(SystemExit) as error:
        main(["exits", str(folder / "model"), *data, *arguments])
    assert error.value.code == 2
    assert "usage: layerskip-vllm exits" in capsys.readouterr().err


def test_command_refuses_a_model_when_it_is_no_decoder(folder, capsys):
    model = folder / "t5"
    shape = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / name, model)
    for path in (model, folder / "no-model"):
        arguments = ["exits", str(path), "--data", str(folder / "text.txt"), *SMALL]
        status = main([*arguments, "--output-dir", str(folder)])
        assert status == 2
        assert f"error: MODEL is '{path}', from which transformers" in capsys.readouterr().err


def test_command_refuses_to_write_when_the_model_is_no_folder(folder, capsys):
    arguments = ["exits", "someone/model", "--data", str(folder / "text.txt"), "--write-config"]
    assert main(arguments) == 2
    assert "error: MODEL is 'someone/model', which is no folder" in capsys.readouterr().err
