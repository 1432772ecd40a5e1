"""Command lines from pydantic models, and the command that holds them all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from layerskip_vllm.tools import commands
from layerskip_vllm.tools.command_line import Command, Option


class BakeCommand(Command):
    """Bake bread.

    It takes a while.
    """

    summary: ClassVar = "make bread of flour"
    extra: ClassVar = "kitchen"
    baked: ClassVar[list[BakeCommand]] = []

    flour: Annotated[str, Option(metavar="FLOUR", is_positional=True)] = Field(description="what")
    seeds: tuple[str, ...] = Field(default=(), description="on top")
    minutes: int = Field(default=40, ge=10, le=90, description="in the oven")
    salt: Annotated[float | None, Option(flag="--nacl", metavar="G")] = Field(
        default=None, description="2 % of the flour"
    )
    shape: Literal["round", "long"] = Field(default="round", description="of the loaf")
    oven: dict[str, Any] = Field(default={}, description="its settings")
    steam: bool = Field(default=False, description="for the crust")
    gas: Annotated[Path | None, Option(excludes="heat")] = Field(default=None, description="from")
    wood: Annotated[Path | None, Option(excludes="heat")] = Field(default=None, description="from")
    fails: bool = Field(default=False, description="as if a module were missing")

    def run(self) -> int:
        if self.fails:
            raise ModuleNotFoundError("No module named 'yeast'")
        self.baked.append(self)
        return 3


@pytest.fixture(autouse=True)
def _bake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "COMMANDS", {"bake": BakeCommand})
    BakeCommand.baked.clear()


def test_fields_have_their_defaults_when_no_option_is_given() -> None:
    assert commands.main(["bake", "rye"]) == 3
    assert BakeCommand.baked == [BakeCommand(flour="rye")]


def test_fields_are_what_the_options_say_when_all_are_given() -> None:
    arguments = ["rye", "--seeds", "sesame", "poppy", "--minutes=50", "--nacl", "9", "--steam"]
    arguments += ["--shape", "long", "--oven", '{"fan": true}', "--wood", "shed"]
    assert commands.main(["bake", *arguments]) == 3
    (bread,) = BakeCommand.baked
    assert bread.model_dump() == {
        "flour": "rye",
        "seeds": ("sesame", "poppy"),
        "minutes": 50,
        "salt": 9.0,
        "shape": "long",
        "oven": {"fan": True},
        "steam": True,
        "gas": None,
        "wood": Path("shed"),
        "fails": False,
    }


def test_help_tells_meanings_ranges_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        commands.main(["bake", "--help"])
    assert ending.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Bake bread. It takes a while." in shown
    assert "--minutes N in the oven; an integer from 10 to 90 (40)" in shown
    assert "--nacl G 2 % of the flour" in shown
    assert "--shape {round,long} of the loaf (round)" in shown
    assert "[--gas PATH | --wood PATH]" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: FLOUR"),
        (["rye", "--minutes", "long"], "argument --minutes: invalid int value: 'long'"),
        (["rye", "--shape", "flat"], "argument --shape: invalid choice: 'flat'"),
        (["rye", "--gas=a", "--wood=b"], "argument --wood: not allowed with argument --gas"),
        (["rye", "--oven", "[1]"], "argument --oven: '[1]' is no JSON object"),
        (["rye", "--sugar"], "unrecognized arguments: --sugar"),
    ],
)
def test_usage_is_shown_when_a_command_line_cannot_be_read(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        commands.main(["bake", *arguments])
    assert ending.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: layerskip-vllm")
    assert message in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "9"], "error: minutes is 9; it must be an integer from 10 to 90.\n"),
        (
            ["--fails"],
            "error: No module named 'yeast'; install what this command needs: "
            "pip install 'layerskip-vllm[kitchen]'\n",
        ),
    ],
)
def test_error_is_one_line_when_a_value_or_a_module_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["bake", "rye", *arguments]) == 2
    assert capsys.readouterr().err == message
    with pytest.raises((ValueError, ImportError)):
        commands.main(["--debug", "bake", "rye", *arguments])


def test_options_are_documented_as_a_table() -> None:
    assert BakeCommand.document().splitlines()[:5] == [
        "| option | meaning | default |",
        "|---|---|---|",
        "| `FLOUR` | what |  |",
        "| `--seeds` | on top |  |",
        "| `--minutes` | in the oven; an integer from 10 to 90 | `40` |",
    ]


def test_nothing_heavy_is_imported_when_help_is_shown() -> None:
    program = (
        "import json, sys\n"
        "from layerskip_vllm.tools.commands import main\n"
        "try:\n    main(['exits', '--help'])\n"
        "except SystemExit:\n    print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    modules = json.loads(done.stdout.splitlines()[-1])
    heavy = {"aiohttp", "matplotlib", "numpy", "prometheus_client", "rich", "torch", "vllm"}
    assert heavy.isdisjoint(modules)
    assert "pydantic" in modules
