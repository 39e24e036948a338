"""Checks arguments: numbers, counts, types and choices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from tfdist.errors import ArgumentError

MOST = 2**53  # a float holds all whole numbers up to it


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_ends: bool = False
) -> None:
    """Refuses a value that is not a number in a range.

    Args:
        name: The name of the argument.
        value: Its value.
        low: The least value.
        high: The largest value.
        open_ends: Whether `low` and `high` themselves are refused.

    Raises:
        ArgumentError: The value is not a number, or out of range.
    """
    number = math.nan
    # `float` would accept True and "1".
    if not isinstance(value, (bool, bytes, str)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(value)
    inside = low < number < high if open_ends else low <= number <= high
    if inside and math.isfinite(number):
        return
    condition = f"between {low} and {high}" if math.isfinite(high) else f"of at least {low}"
    if open_ends:
        condition = f"above {low}" + (f" and below {high}" if math.isfinite(high) else "")
    raise ArgumentError(f"`{name}` must be a number {condition}. Received: {name}={value!r}.")


def check_count(name: str, value: Any, low: int) -> None:
    """Refuses a value that is not a whole number of at least `low`.

    Args:
        name: The name of the argument.
        value: Its value.
        low: The least value.

    Raises:
        ArgumentError: The value is not a whole number, or out of range.
    """
    # NumPy's integers have it, floats do not. True and False do.
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_whole or value < low:
        raise ArgumentError(
            f"`{name}` must be a whole number of at least {low}. Received: {name}={value!r}."
        )
    if value > MOST:
        raise ArgumentError(
            f"`{name}` must be at most 2**53. Received: {name} with {int(value).bit_length()} "
            "bits. Pass a smaller number."
        )


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], names: str) -> None:
    """Refuses a value of another type.

    Args:
        name: The name of the argument.
        value: Its value.
        kinds: The allowed types.
        names: Their names, as a part of a sentence.

    Raises:
        ArgumentError: The value has another type.
    """
    if not isinstance(value, kinds):
        raise ArgumentError(f"`{name}` must be {names}. Received: {name}={value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses a value that is not one of several choices.

    Args:
        name: The name of the argument.
        value: Its value.
        choices: The choices.

    Raises:
        ArgumentError: The value is not one of them.
    """
    if value not in choices:
        raise ArgumentError(
            f"`{name}` must be one of {tuple(choices)}. Received: {name}={value!r}."
        )
