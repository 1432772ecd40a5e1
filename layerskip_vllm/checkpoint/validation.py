"""Settings as pydantic models: what all of them share, and one line for what does not fit.

Training configs and the tools' command lines are such models; a field's type, range and description
are what their errors, their help and the tables in the docs are made from.
"""

import difflib
import enum
import json
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

MAX_LISTED_KEYS = 20
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}

Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """Settings that do not change, take no unknown field and no value of another type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


def parse(model: type[Model], values: Any, where: str = "") -> Model:
    """Make settings of a mapping as YAML and JSON have it, which errors call `where`.

    Lists become tuples where those are wanted, integers floats. `ValueError` if something does not
    fit, see `explain`.
    """
    try:
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ValueError(explain(error, model, where)) from error


def explain(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """Say in one line what is wrong: the first field, its value and what would be right.

    Such as "layerskip.e_scale is 7; it must be a number from 0 to 1.", where `where` is layerskip.
    """
    errors = error.errors(include_url=False)
    # What is missing may be there under a misspelled name.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path, kind = list(first["loc"]), first["type"]
    key = path.pop() if kind in ("missing", "extra_forbidden") else None
    name, wanted, metadata = where, cast(Any, model), cast(Sequence[Any], ())
    for part in path:
        step = _step(wanted, part)
        if step is None:  # a member of a union, which is described as a whole
            break
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
        wanted, metadata = step
    if kind == "missing":
        return f"{name or 'The config'} has no {key!r}, which it must have."
    if kind == "extra_forbidden":
        known = next(option.model_fields for option in _options(wanted) if _is_model(option))
        return f"{name or 'The config'} has the unknown key {key!r}; {suggest(str(key), [*known])}."
    if kind == "value_error":
        return f"{name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    value = first["input"]
    return f"{name or 'The config'} is {value!r}; it must be {describe(wanted, metadata)}."


def describe(wanted: Any, metadata: Sequence[Any] = ()) -> str:
    """Say what a field takes, such as "an integer of at least 1"; that it may be None goes unsaid.

    `wanted` is its type annotation, `metadata` its limits as `FieldInfo.metadata` has them.
    """
    options = _options(wanted)
    if len(options) > 1:
        return " or ".join(describe(option, metadata) for option in options)
    (option,) = options
    origin = get_origin(option) or option
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(option)))}"
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return f"one of {', '.join(str(member.value) for member in option)}"
    if origin in (list, tuple):
        return "a list" + _describe_range(metadata)
    if origin is dict or _is_model(option):
        return "a mapping"
    return _NAMES.get(option, str(option)) + _describe_range(metadata)


def _describe_range(metadata: Sequence[Any]) -> str:
    limits = {
        name: value
        for item in metadata
        for name in ("ge", "gt", "le", "lt", "min_length")
        if (value := getattr(item, name, None)) is not None
    }
    if limits.keys() == {"ge", "le"}:
        return f" from {limits['ge']} to {limits['le']}"
    words = {"gt": "above", "le": "of at most", "lt": "below"}
    parts = [f"{words.get(name, 'of at least')} {value}" for name, value in limits.items()]
    return f" {' and '.join(parts)}".replace("and of", "and") if parts else ""


def suggest(key: str, known: Sequence[str]) -> str:
    """Say which keys are known, or like `key` where they are many."""
    if len(known) <= MAX_LISTED_KEYS:
        return f"known are {', '.join(known)}"
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    return f"like it are {', '.join(close)}" if close else "no known one is like it"


def _step(wanted: Any, part: int | str) -> tuple[Any, Sequence[Any]] | None:
    """Find the annotation and limits of a model's field or a list's item, None for neither."""
    for option in _options(wanted):
        if _is_model(option) and part in option.model_fields:
            field = option.model_fields[part]
            return field.annotation, field.metadata
        if isinstance(part, int) and get_origin(option) in (list, tuple):
            return get_args(option)[0], ()
    return None


def _options(wanted: Any) -> list[Any]:
    """List the members of a union without None; the annotation alone if it is none."""
    if get_origin(wanted) in (Union, UnionType):
        return [option for option in get_args(wanted) if option is not NoneType]
    return [wanted]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
