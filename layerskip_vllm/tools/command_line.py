"""Command lines from pydantic models: a field is an option, with its type, range, default and help.

A command's docstring is its description. This is argparse and no other library: pydantic-settings
takes no `--data FILE FILE` and answers a wrong value with a traceback, cyclopts imports rich to
show any help.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from layerskip_vllm.checkpoint.validation import Settings, describe, explain


@dataclass(frozen=True)
class Option:
    """How a field stands on the command line, where it is not `--its-name`."""

    flag: str | None = None  # another name, with its dashes
    metavar: str | None = None  # what help calls its value
    is_positional: bool = False  # stands without a name
    excludes: str | None = None  # a name shared by options of which only one may be given


class Command(Settings):
    """What a subcommand was told."""

    summary: ClassVar[str]  # what the list of all commands says of it
    extra: ClassVar[str | None] = None  # of `pip install`: what it imports when it runs

    def run(self) -> int:
        """Do it, and return the exit status."""
        raise NotImplementedError

    @classmethod
    def add_parser(cls, subparsers: Any, name: str) -> None:
        """Add the subcommand to a parser; its namespace names the class as `command`."""
        description = inspect.cleandoc(cls.__doc__ or "")
        parser = subparsers.add_parser(name, help=cls.summary, description=description)
        parser.set_defaults(command=cls)
        groups: dict[str, Any] = {}
        for field_name, field, option in cls._options():
            group = parser
            if option.excludes is not None:
                if option.excludes not in groups:
                    groups[option.excludes] = parser.add_mutually_exclusive_group()
                group = groups[option.excludes]
            _add_argument(group, field_name, field, option)

    @classmethod
    def parse(cls, args: argparse.Namespace) -> Self:
        """Make the command of what its parser has read; a ValueError says what does not fit."""
        given = {name: value for name, value in vars(args).items() if name in cls.model_fields}
        lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        try:
            return cls(**{**given, **lists})
        except ValidationError as error:
            raise ValueError(explain(error, cls)) from error

    @classmethod
    def document(cls) -> str:
        """Return a table of all options in Markdown."""
        rows = ["| option | meaning | default |", "|---|---|---|"]
        for name, field, option in cls._options():
            shown = option.metavar if option.is_positional else _flag(name, option)
            default = _show_default(field)
            rows.append(f"| `{shown}` | {_describe(field)} | {default and f'`{default}`'} |")
        return "\n".join(rows)

    @classmethod
    def _options(cls) -> Iterator[tuple[str, FieldInfo, Option]]:
        """Each field's name, itself and how it stands on the command line; positionals first."""
        options = [
            (name, field, next((m for m in field.metadata if isinstance(m, Option)), Option()))
            for name, field in cls.model_fields.items()
        ]
        yield from sorted(options, key=lambda item: not item[2].is_positional)


def _add_argument(group: Any, name: str, field: FieldInfo, option: Option) -> None:
    default = _show_default(field)
    settings: dict[str, Any] = {
        "default": argparse.SUPPRESS,  # the model has the defaults
        "help": (_describe(field) + (f" ({default})" if default else "")).replace("%", "%%"),
    }
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    is_optional = len(kinds) < len(get_args(field.annotation))
    kind: Any = kinds[0] if is_optional else field.annotation
    if kind is bool:
        settings["action"] = "store_true"
    elif get_origin(kind) is Literal:
        settings["choices"] = get_args(kind)
    elif get_origin(kind) is tuple:
        settings |= {"type": get_args(kind)[0], "nargs": "*" if option.is_positional else "+"}
    elif get_origin(kind) is dict:
        settings |= {"type": _read_object, "metavar": "JSON"}
    else:
        settings |= {"type": kind, "metavar": {int: "N", Path: "PATH"}.get(kind)}
    if option.metavar is not None:
        settings["metavar"] = option.metavar
    if not option.is_positional:
        settings["required"] = field.is_required()
        group.add_argument(_flag(name, option), dest=name, **settings)
        return
    if not field.is_required():
        settings.setdefault("nargs", "?")
    group.add_argument(name, **settings)


def _flag(name: str, option: Option) -> str:
    return option.flag or "--" + name.replace("_", "-")


def _describe(field: FieldInfo) -> str:
    """Say what a field means, and its range where it has one."""
    limits = [limit for limit in field.metadata if not isinstance(limit, Option)]
    if not limits:
        return field.description or ""
    return f"{field.description}; {describe(field.annotation, limits)}"


def _show_default(field: FieldInfo) -> str:
    """Show the default; nothing where there is none, or it is to do nothing."""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if default is None or default is False or default in ((), {}):
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value
