"""YAML to dataclasses: what is read as what, and what each mistake is called."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from layerskip_vllm.training.strict_yaml import make_dataclass, override, read_yaml


@dataclass(frozen=True)
class Inner:
    name: str
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.share < 0:
            raise ValueError(f"share is {self.share}; it must be at least 0.")


@dataclass(frozen=True)
class Outer:
    count: int
    kind: Literal["a", "b"] = "a"
    is_on: bool = False
    rate: float | None = None
    either: int | str = 0
    inner: Inner | None = None
    items: tuple[Inner, ...] = ()
    numbers: list[int] = field(default_factory=list)
    others: dict[str, Any] | None = None


def make(text: str) -> Outer:
    return make_dataclass(Outer, read_yaml(text), "")


def test_yaml_becomes_dataclasses_when_all_fits():
    outer = make("""
        count: 2
        kind: b
        is_on: true
        rate: 3e-5
        either: x
        inner: {name: n, share: 2}
        items: [{name: i}, {name: j, share: 0.5}]
        numbers: [1, 2]
        others: {k: [v]}
    """)

    assert outer == Outer(
        2, "b", True, 3e-5, "x", Inner("n", 2.0), (Inner("i"), Inner("j", 0.5)), [1, 2],
        {"k": ["v"]},
    )  # fmt: skip
    assert isinstance(outer.inner.share, float)


@pytest.mark.parametrize(
    ("text", "number"), [("3e-5", 3e-5), ("1E3", 1000.0), ("-2.5e+1", -25.0), ("1.e2", 100.0)]
)
def test_number_is_a_float_when_it_has_an_exponent(text, number):
    assert make(f"{{count: 1, rate: {text}}}").rate == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{count: 1, cuont: 2}", "The config has the unknown key 'cuont'; known are count, kind"),
        ("{kind: a}", "The config has no 'count', which it must have"),
        ("{count: 1.5}", "count is 1.5; it must be an integer"),
        ("{count: true}", "count is True; it must be an integer"),
        ("{count: '1'}", "count is '1'; it must be an integer"),
        ("{count: 1, kind: c}", "kind is 'c'; it must be one of a, b"),
        ("{count: 1, is_on: 1}", "is_on is 1; it must be true or false"),
        ("{count: 1, rate: fast}", "rate is 'fast'; it must be a number"),
        ("{count: 1, either: [1]}", r"either is \[1\]; it must be an integer or a string"),
        ("{count: 1, inner: 3}", "inner is 3; it must be a mapping"),
        ("{count: 1, inner: {}}", "inner has no 'name', which it must have"),
        ("{count: 1, inner: {name: 2}}", "inner.name is 2; it must be a string"),
        ("{count: 1, inner: {name: n, share: -1}}", "inner: share is -1.0; it must be at least 0"),
        ("{count: 1, items: {name: i}}", "items is .*; it must be a list"),
        ("{count: 1, items: [{name: i, x: 1}]}", r"items\[0\] has the unknown key 'x'"),
        ("{count: 1, numbers: [1, a]}", r"numbers\[1\] is 'a'; it must be an integer"),
        ("{count: 1, others: [1]}", r"others is \[1\]; it must be a mapping"),
        ("[1, 2]", "it must be a mapping of sections"),
        ("{count: 1, count: 2}", "The key 'count' is given twice"),
        ("{count: [1}", "The config is not YAML"),
    ],
)
def test_error_names_the_key_and_value_when_something_does_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        make(text)


def test_override_sets_values_of_sections_and_list_items():
    tree = {"a": {"b": 1}, "items": [{"name": "x"}]}

    for assignment in ("a.b=2e-3", "a.c=[1, two]", "items.0.name=y", "new.key=true", "text=a=b"):
        override(tree, assignment)

    assert tree == {
        "a": {"b": 2e-3, "c": [1, "two"]},
        "items": [{"name": "y"}],
        "new": {"key": True},
        "text": "a=b",
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("a.b", "'a.b' sets nothing; write KEY=VALUE"),
        ("items.1.name=y", "items has 1 items and no '1'"),
        ("items.name=y", "items has 1 items and no 'name'"),
        ("a.b.c=1", "a.b is 1 and has no parts"),
        ("a.b.c.d=1", "a.b is 1 and has no parts"),
        ("a.b=*.py", r"'a.b=\*.py' sets what is no YAML; put the value in quotes of its own"),
        ("a.b=[1", "sets what is no YAML"),
    ],
)
def test_override_names_the_part_when_there_is_none(assignment, message):
    with pytest.raises(ValueError, match=message):
        override({"a": {"b": 1}, "items": [{"name": "x"}]}, assignment)
