"""Checks of single settings, for every part of the package; plain Python."""

from typing import Any


def check_positive_int(name: str, value: Any) -> int:
    """Check that a setting is an integer of at least 1.

    Args:
        name: What the error calls the setting.
        value: The setting's value.

    Returns:
        `value`.

    Raises:
        ValueError: If it is anything else; a bool, a float or a numeral in a string too.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
    return value
