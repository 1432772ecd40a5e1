"""Writes docs/commands.md from the commands' own models: `python -m scripts.commands_page`."""

from __future__ import annotations

import inspect
from pathlib import Path

from layerskip_vllm.tools.commands import COMMANDS

PAGE = Path(__file__).parents[1] / "docs/commands.md"
_INTRODUCTION = """# The commands and their options

Made by `python -m scripts.commands_page`; a test compares the two. `layerskip-vllm COMMAND --help`
prints the same. On an error the exit status is 2; `layerskip-vllm --debug COMMAND` shows where it
comes from.
"""


def write_page() -> str:
    """Write a section for each command: what it does, and the table of its options."""
    sections = (
        f"\n## layerskip-vllm {name}\n\n{inspect.cleandoc(command.__doc__ or '')}\n\n"
        f"{command.document()}\n"
        for name, command in COMMANDS.items()
    )
    return _INTRODUCTION + "".join(sections)


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
