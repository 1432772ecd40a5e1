"""Programs other than `vllm serve` that fill vLLM's parser, each in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.documented import ROOT
from tests.e2e.serving.server import environment
from tests.support.scripts import see

MODEL = str(ROOT / "checkpoints/stdlib-24l")

# Says what each command line makes: E and K, or the parser's exit status.
PROGRAM = """
import json, sys
{before}
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = {arguments}.add_cli_args(FlexibleArgumentParser())

def make(flags):
    try:
        args = parser.parse_args([f"--model={{sys.argv[1]}}", *flags])
    except SystemExit as end:
        return end.code
    args = {arguments}.from_cli_args(args)
    model_config = args.create_model_config()
    config = args.create_speculative_config(model_config, ParallelConfig())
    return [config.exit_layer, config.num_speculative_tokens]

print("seen:" + json.dumps([make(flags) for flags in json.loads(sys.argv[2])]))
"""
# As docs/speed.md has it.
LOAD = "from vllm.plugins import load_general_plugins; load_general_plugins()"

VLLMS_OWN = [
    ["--speculative-config", '{"method": "layerskip"}'],
    ["--speculative-config", '{"method": "layerskip", "exit_layer": 3}', "--spec-tokens=2"],
    ["--spec-model=layerskip", "--spec-tokens=2"],
]
OURS = [
    ["--speculative-model=layerskip", "--spec-exit-layer=3", "--num-speculative-tokens=2"],
    ["--spec-method=layerskip"],
]


def run(before: str, arguments: str, flags: list[list[str]]) -> Any:
    program = PROGRAM.format(before=before, arguments=arguments)
    return see(program, MODEL, json.dumps(flags), env=environment())


@pytest.mark.parametrize(
    ("before", "arguments"),
    [(LOAD, "EngineArgs"), ("", "AsyncEngineArgs")],
    ids=["plugins loaded first", "AsyncEngineArgs, which loads them"],
)
def test_all_flags_are_known_when_plugins_are_loaded_before_the_parser_is_filled(
    before: str, arguments: str
) -> None:
    assert run(before, arguments, [*VLLMS_OWN, *OURS]) == [[6, 4], [3, 2], [6, 2], [3, 2], [6, 4]]


def test_vllms_own_flags_take_layerskip_when_no_plugin_is_loaded_before() -> None:
    """A parser that was filled without the plugin lacks its flags alone."""
    assert run("", "EngineArgs", [*VLLMS_OWN, *OURS]) == [[6, 4], [3, 2], [6, 2], 2, 2]


@pytest.mark.parametrize("command", ["bench latency"])
def test_command_of_vllm_knows_the_flags_when_asked_for_help(command: str) -> None:
    program = """
import contextlib, io, json, sys
from vllm.entrypoints.cli.main import main
sys.argv = ["vllm", *sys.argv[1].split(), "--help=LayerSkip"]
with contextlib.redirect_stdout(io.StringIO()) as help, contextlib.suppress(SystemExit):
    main()
print("seen:" + json.dumps(help.getvalue()))
"""
    assert "--speculative-model" in see(program, command, env=environment())
