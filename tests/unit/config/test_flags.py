"""The flags of `vllm serve`, through vLLM's own parser."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.exit_adapters import make_exit_adapter

Parse = Callable[..., Any]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """What the command `vllm` parses its arguments with."""
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(dest="subparser")
    for command in serve.cmd_init():
        command.subparser_init(subparsers)
    return parser


@pytest.fixture(scope="module")
def parse(parser: argparse.ArgumentParser, write_model: Callable[..., str]) -> Parse:
    """Make the speculative config of `vllm serve MODEL` with these flags."""
    from vllm.config import ParallelConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    model = write_model("llama")
    model_config = AsyncEngineArgs(model=model, skip_tokenizer_init=True).create_model_config()

    def parse(*flags: str) -> Any:
        args = parser.parse_args(["serve", model, "--skip-tokenizer-init", *flags])
        args.model = args.model_tag
        engine_args = AsyncEngineArgs.from_cli_args(args)
        return engine_args.create_speculative_config(model_config, ParallelConfig())

    return parse


def chosen(config: Any) -> tuple[int, int]:
    assert type(config).__name__ == "LayerSkipConfig"
    return config.exit_layer, config.num_speculative_tokens


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--speculative-model=layerskip", (2, 4)),
        ("--speculative-model layerskip --num-speculative-tokens 6 --spec-exit-layer 3", (3, 6)),
        ("--speculative_model=layerskip --num_speculative_tokens=6 --spec_exit_layer=3", (3, 6)),
        ("--spec-model layerskip --spec-tokens 5", (2, 5)),
        ("--spec-method layerskip", (2, 4)),
        ("--spec-method=layerskip --spec-tokens=5 --spec-exit-layer=1", (1, 5)),
        ("--speculative-config.method layerskip --speculative-config.exit_layer 3", (3, 4)),
        ("--speculative-config.method=layerskip --spec-exit-layer=3 --spec-tokens=2", (3, 2)),
    ],
)
def test_flags_choose_the_draft_when_spelled_in_any_way(
    parse: Parse, flags: str, expected: tuple[int, int]
) -> None:
    assert chosen(parse(*flags.split())) == expected


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ("--speculative-model=layerskip --num-speculative-tokens=auto", 8),
        ("--speculative-model=layerskip --num-speculative-tokens auto:5", 5),
        ("-sc.method layerskip -sc.num_speculative_tokens auto:6", 6),
    ],
)
def test_flag_leaves_the_length_to_the_engine_when_it_is_auto(
    parse: Parse, flags: str, most: int
) -> None:
    config = parse(*flags.split())
    assert config.is_length_auto
    assert chosen(config) == (2, most)


def test_flags_choose_the_draft_when_given_as_json(parse: Parse) -> None:
    config = {"method": "layerskip", "exit_layer": 4, "num_speculative_tokens": 6}
    assert chosen(parse("--speculative-config", json.dumps(config))) == (4, 6)
    assert chosen(parse("-sc", json.dumps(config))) == (4, 6)


@pytest.mark.parametrize("flag", ["--spec-exit-adapter={}", "--spec_exit_adapter {}"])
def test_flag_names_the_exit_adapter_when_given(parse: Parse, tmp_path: Path, flag: str) -> None:
    folder = make_exit_adapter(tmp_path / "adapter", exit_layer=3, num_speculative_tokens=5)
    config = parse("--speculative-model=layerskip", *flag.format(folder).split())
    assert chosen(config) == (3, 5)
    assert config.exit_adapter == str(folder)


def test_flags_reach_an_api_server_when_it_has_no_plugins_yet(
    parser: argparse.ArgumentParser, write_model: Callable[..., str]
) -> None:
    """With several of them, each makes its engine arguments of what the first process parsed."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    flags = ["--speculative-model=layerskip", "--spec-exit-layer=3", "--spec-exit-adapter=there"]
    args = parser.parse_args(["serve", write_model("llama"), *flags])
    AsyncEngineArgs.from_cli_args(args)
    without_hook = AsyncEngineArgs.from_cli_args.__func__.__wrapped__
    for _ in range(2):
        args = pickle.loads(pickle.dumps(args))
        engine_args = without_hook(AsyncEngineArgs, args)
        assert engine_args.speculative_config == {"exit_layer": 3, "exit_adapter": "there"}
        AsyncEngineArgs.from_cli_args(args)  # in the hands of a plugin again, it stays so


@pytest.mark.parametrize(
    ("lines", "flags", "expected"),
    [
        ("speculative-model: layerskip\nnum-speculative-tokens: 5\nspec-exit-layer: 3", "", (3, 5)),
        ("speculative_model: layerskip\nspec_exit_layer: 3", "--spec-exit-layer 1", (1, 4)),
        ("speculative-config:\n  method: layerskip\n  exit_layer: 3", "--spec-tokens 2", (3, 2)),
    ],
    ids=["flags", "command line wins", "nested"],
)
def test_flags_choose_the_draft_when_they_are_in_a_yaml_file(
    parse: Parse, tmp_path: Path, lines: str, flags: str, expected: tuple[int, int]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(lines)
    assert chosen(parse("--config", str(file), *flags.split())) == expected


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            "--spec-exit-layer 4",
            ["--spec-exit-layer is 4", "not layerskip", "add --speculative-model=layerskip"],
        ),
        (
            "--spec-method ngram --spec-tokens 3 --spec-exit-layer 4",
            ["--spec-exit-layer is 4", "not layerskip", "or leave the flag out"],
        ),
        (
            "--speculative-config.method layerskip --speculative-config.exit_layer 3 "
            "--spec-exit-layer 3",
            ["--spec-exit-layer and --speculative-config['exit_layer'] are mutually exclusive"],
        ),
        (
            "--speculative-config.method layerskip --speculative-config.exit-layer 3 "
            "--spec-exit-layer 3",
            ["--spec-exit-layer and --speculative-config['exit_layer'] are mutually exclusive"],
        ),
        (
            "--spec-exit-adapter some/folder",
            ["--spec-exit-adapter is some/folder", "add --speculative-model=layerskip"],
        ),
        (
            "--speculative-config.method layerskip --speculative-config.exit_adapter there "
            "--spec-exit-adapter here",
            ["--spec-exit-adapter and --speculative-config['exit_adapter'] are mutually exclusive"],
        ),
        (
            "--speculative-model=layerskip --spec-exit-adapter not/there",
            ["exit_adapter is '", "not/there', which has no exit_adapter.json"],
        ),
        (
            "--speculative-config.model layerskip --speculative-model layerskip",
            ["--spec-model and --speculative-config['model'] are mutually exclusive"],
        ),
        ("--speculative-model=layerskip --spec-exit-layer 0", ["exit_layer is 0", "at least 1"]),
        ("--speculative-model=layerskip --spec-exit-layer 9", ["exit_layer is 9", "8 layers"]),
        (
            "--speculative-model=layerskip --num-speculative-tokens 0",
            ["num_speculative_tokens is 0", "at least 1"],
        ),
        (
            "--speculative-config.method layerskip --speculative-config.exit_layer two",
            ["exit_layer is 'two'", "must be an integer"],
        ),
    ],
)
def test_flags_are_refused_when_they_make_no_sense(
    parse: Parse, flags: str, parts: list[str]
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is looked at below)
        parse(*flags.split())
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            "--speculative-model=layerskip --spec-exit-layer two",
            ["--spec-exit-layer", "invalid int value: 'two'"],
        ),
        (
            "--speculative-model=layerskip --num-speculative-tokens 2.5",
            ["--num-speculative-tokens", "'2.5' is no number of tokens", "'auto:8'"],
        ),
        ("--spec-method LayerSkip", ["--spec-method", "'LayerSkip'", "layerskip"]),
    ],
)
def test_parser_exits_with_a_usage_error_when_a_flag_has_the_wrong_type(
    parse: Parse, capsys: pytest.CaptureFixture[str], flags: str, parts: list[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(*flags.split())
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message


def test_flags_leave_vllm_alone_when_layerskip_is_not_asked_for(parse: Parse) -> None:
    assert parse() is None
    config = parse("--spec-method", "ngram", "--spec-tokens", "3")
    assert (type(config).__name__, config.method) == ("SpeculativeConfig", "ngram")
    config = parse("--spec-method=ngram", "--num-speculative-tokens=3")
    assert (config.method, config.num_speculative_tokens) == ("ngram", 3)


def test_help_explains_the_flags_when_asked(parser: argparse.ArgumentParser) -> None:
    help_texts = {
        flag: action.help
        for action in parser._subparsers._group_actions[0].choices["serve"]._actions
        for flag in action.option_strings
    }
    assert "--spec-model" in help_texts["--speculative-model"]
    assert "--spec-tokens" in help_texts["--num-speculative-tokens"]
    assert "number of layers that draft" in help_texts["--spec-exit-layer"]
    assert "brings E and K" in help_texts["--spec-exit-adapter"]
