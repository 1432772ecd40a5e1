"""Settings made of plain values: what is taken as what, and what each mistake is called."""

from enum import Enum
from typing import Any, Literal, Self

import pytest
from pydantic import Field, ValidationError, model_validator

from layerskip_vllm.checkpoint.validation import Settings, explain, parse


class Color(Enum):
    RED = "red"


class Inner(Settings):
    name: str
    share: float = Field(default=1.0, ge=0)
    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}; it must be at most high, {self.high}.")
        return self


class Outer(Settings):
    count: int = Field(ge=1)
    kind: Literal["a", "b"] = "a"
    is_on: bool = False
    rate: float | None = Field(default=None, ge=0, lt=1)
    either: int | str = 0
    inner: Inner | None = None
    items: tuple[Inner, ...] = ()
    numbers: list[int] = Field(default=[], min_length=0)
    filled: tuple[int, ...] = Field(default=(1,), min_length=1)
    others: dict[str, Any] | None = None
    color: Color | None = None
    percent: float = Field(default=5, gt=0, le=100)
    level: int = Field(default=1, ge=1, le=3)


def test_plain_values_become_settings_when_all_fits():
    outer = parse(
        Outer,
        {
            "count": 2,
            "kind": "b",
            "is_on": True,
            "rate": 3e-5,
            "either": "x",
            "inner": {"name": "n", "share": 2},
            "items": [{"name": "i"}, {"name": "j", "share": 0.5}],
            "numbers": [1, 2],
            "others": {"k": ["v"]},
            "color": "red",
        },
    )

    assert outer == Outer(
        count=2, kind="b", is_on=True, rate=3e-5, either="x", inner=Inner(name="n", share=2.0),
        items=(Inner(name="i"), Inner(name="j", share=0.5)), numbers=[1, 2], others={"k": ["v"]},
        color=Color.RED,
    )  # fmt: skip
    assert isinstance(outer.inner.share, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1, "cuont": 2}, "The config has the unknown key 'cuont'; known are count, kind"),
        ({"cuont": 2}, "The config has the unknown key 'cuont'; known are count, kind"),
        ({"kind": "a"}, "The config has no 'count', which it must have."),
        ({"count": 1.5}, "count is 1.5; it must be an integer of at least 1."),
        ({"count": 0}, "count is 0; it must be an integer of at least 1."),
        ({"count": True}, "count is True; it must be an integer"),
        ({"count": "1"}, "count is '1'; it must be an integer"),
        ({"count": 1, "kind": "c"}, "kind is 'c'; it must be one of a, b."),
        ({"count": 1, "is_on": 1}, "is_on is 1; it must be true or false."),
        (
            {"count": 1, "rate": "fast"},
            "rate is 'fast'; it must be a number of at least 0 and below 1.",
        ),
        ({"count": 1, "rate": 1}, "rate is 1; it must be a number of at least 0 and below 1."),
        ({"count": 1, "either": [1]}, "either is [1]; it must be an integer or a string."),
        ({"count": 1, "inner": 3}, "inner is 3; it must be a mapping."),
        ({"count": 1, "inner": {}}, "inner has no 'name', which it must have."),
        ({"count": 1, "inner": {"name": 2}}, "inner.name is 2; it must be a string."),
        (
            {"count": 1, "inner": {"name": "n", "share": -1}},
            "inner.share is -1; it must be a number of at least 0.",
        ),
        (
            {"count": 1, "inner": {"name": "n", "low": 10}},
            "inner: low is 10; it must be at most high, 9.",
        ),
        ({"count": 1, "items": {"name": "i"}}, "items is {'name': 'i'}; it must be a list."),
        ({"count": 1, "items": [{"name": "i", "x": 1}]}, "items[0] has the unknown key 'x'; known"),
        ({"count": 1, "items": [{"name": "i", "high": "x"}]}, "items[0].high is 'x';"),
        ({"count": 1, "numbers": [1, "a"]}, "numbers[1] is 'a'; it must be an integer."),
        ({"count": 1, "filled": []}, "filled is []; it must be a list of at least 1."),
        ({"count": 1, "others": [1]}, "others is [1]; it must be a mapping."),
        ({"count": 1, "color": "blue"}, "color is 'blue'; it must be one of red."),
        (
            {"count": 1, "percent": 0},
            "percent is 0; it must be a number above 0 and at most 100.",
        ),
        ({"count": 1, "level": 4}, "level is 4; it must be an integer from 1 to 3."),
        ([1, 2], "The config is [1, 2]; it must be a mapping."),
    ],
    ids=str,
)
def test_error_names_the_key_and_value_when_something_does_not_fit(values, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as raised:
        parse(Outer, values)

    assert str(raised.value).startswith(message)


def test_error_names_the_section_when_it_is_a_part_of_more():
    with pytest.raises(ValueError, match=r"^training\.count is 0; it must be"):
        parse(Outer, {"count": 0}, "training")
    with pytest.raises(ValueError, match=r"^training has no 'count'"):
        parse(Outer, {}, "training")


def test_unknown_key_is_compared_when_there_are_too_many_to_list():
    class Many(Settings):
        __annotations__ = {f"field_{i}": int for i in range(30)}

    with pytest.raises(ValueError, match=r"unknown key 'field_77'; like it are field_7, "):
        parse(Many, {"field_77": 1})
    with pytest.raises(ValueError, match=r"unknown key 'x'; no known one is like it"):
        parse(Many, {"x": 1})


def test_settings_made_in_python_are_explained_in_the_same_words():
    with pytest.raises(ValidationError) as raised:
        Outer(count=1, rate=2.0)

    assert explain(raised.value, Outer) == (
        "rate is 2.0; it must be a number of at least 0 and below 1."
    )


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Outer(count=1).count = 2
