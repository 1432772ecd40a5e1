"""Reads YAML into dataclasses, and says exactly what is wrong where it does not fit.

The one place where a training config's keys and types are checked; ranges are the dataclasses' own.
"""

import difflib
import enum
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")
MAX_LISTED_KEYS = 20


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with 1.2's floats (3e-5 is one), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"The key {twice[0]!r} is given twice{node.start_mark}.")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    # What SafeLoader takes for a string: an exponent without a point or without a sign.
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_yaml(text: str) -> dict[str, Any]:
    """Reads a YAML text whose top is a mapping.

    Args:
        text: The YAML.

    Returns:
        Its plain values.

    Raises:
        ValueError: It is no YAML, is not a mapping, or has a key twice.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"The config is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"The config is {tree!r}; it must be a mapping of sections.")
    return tree


def override(tree: dict[str, Any], assignment: str) -> None:
    """Sets one value of a config in place.

    Args:
        tree: What `read_yaml` returned.
        assignment: `training.max_steps=100`, or `data.train.0.path=...` for a list's item; the
            value is YAML.

    Raises:
        ValueError: There is no `=`, the value is no YAML, or the path goes through something that
            has no such part.
    """
    path, equals, value = assignment.partition("=")
    if not equals or not path:
        raise ValueError(f"{assignment!r} sets nothing; write KEY=VALUE, as in training.seed=1.")
    try:
        new = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{assignment!r} sets what is no YAML; put the value in quotes of its own, as in "
            f"{path}='\"...\"'. {error}"
        ) from error
    *parents, last = path.split(".")
    node: Any = tree
    for i, part in enumerate(parents):
        if isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            node = node[_index(node, part, ".".join(parents[:i]), assignment)]
    if isinstance(node, dict):
        node[last] = new
    else:
        node[_index(node, last, ".".join(parents), assignment)] = new


def _index(node: Any, part: str, where: str, assignment: str) -> int:
    if not isinstance(node, list):
        raise ValueError(f"{assignment!r} cannot be set: {where} is {node!r} and has no parts.")
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(
            f"{assignment!r} cannot be set: {where} has {len(node)} items and no {part!r}."
        )
    return int(part)


def convert(kind: Any, value: Any, where: str) -> Any:
    """Returns a YAML value as what a dataclass's field wants.

    Args:
        kind: A type annotation: a dataclass, a plain type, a Literal, a Union, or a list, tuple or
            dict of such. Values for any other kind are left as they are.
        value: The YAML value.
        where: What errors call it.

    Returns:
        The value; lists become tuples where those are wanted, ints floats, mappings dataclasses.

    Raises:
        ValueError: It does not fit.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return make_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    fits = True
    if kind in (None, type(None)):
        fits = value is None
    elif origin is Literal:
        fits = value in arguments
    elif kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif kind in (str, bool):
        fits = isinstance(value, kind)
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        fits = value in [member.value for member in kind]
    elif (origin or kind) in (list, tuple):
        fits = isinstance(value, list)
        if fits:
            item = arguments[0] if arguments else Any
            items = [convert(item, entry, f"{where}[{i}]") for i, entry in enumerate(value)]
            return tuple(items) if (origin or kind) is tuple else items
    elif (origin or kind) is dict:
        fits = isinstance(value, dict)
    if not fits:
        raise ValueError(f"{where} is {value!r}; it must be {describe(kind)}.")
    return value


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds:
        try:
            return convert(kind, value, where)
        except ValueError:
            if len(kinds) == 1:
                raise
    names = " or ".join(describe(kind) for kind in kinds)
    raise ValueError(f"{where} is {value!r}; it must be {names}.")


def make_dataclass(kind: type[T], value: Any, where: str) -> T:
    """Makes a dataclass from a YAML mapping.

    Args:
        kind: The dataclass.
        value: The mapping.
        where: What errors call it; nothing for the config's top.

    Returns:
        The dataclass.

    Raises:
        ValueError: A key is unknown or missing, or a value does not fit.
    """
    named = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    given = check_fields(kind, value, where)
    for name, field in named.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where or 'The config'} has no {name!r}, which it must have.")
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def check_fields(kind: type[Any], value: Any, where: str) -> dict[str, Any]:
    """Checks a YAML mapping's keys and types against a dataclass's fields, without making one.

    Args:
        kind: The dataclass.
        value: The mapping; None, an empty section, is one without keys.
        where: What errors call it.

    Returns:
        The converted values.

    Raises:
        ValueError: It is not a mapping, a key is unknown, or a value does not fit.
    """
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; it must be a mapping.")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in fields(kind) if field.init]
    for key in value:
        if key not in known:
            raise ValueError(
                f"{where or 'The config'} has the unknown key {key!r}; {_suggest(str(key), known)}."
            )
    prefix = f"{where}." if where else ""
    return {key: convert(hints[key], entry, prefix + key) for key, entry in value.items()}


def _suggest(key: str, known: list[str]) -> str:
    if len(known) <= MAX_LISTED_KEYS:
        return f"known are {', '.join(known)}"
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    return f"like it are {', '.join(close)}" if close else "no known one is like it"


def describe(kind: Any) -> str:
    """Returns what errors call a type annotation."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    if (origin or kind) in (list, tuple):
        return "a list"
    if (origin or kind) is dict or is_dataclass(kind):
        return "a mapping"
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(kind, str(kind))
