"""Numbers, counts and words that a function was given, refused where they make no sense."""

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
    """Refuses what is no number or out of range.

    Args:
        name: The argument's.
        value: To be checked.
        low: The least value.
        high: The largest value.
        open_ends: Whether `low` and `high` themselves are refused.

    Raises:
        ArgumentError: It must not be that.
    """
    number = math.nan
    if not isinstance(value, (bool, bytes, str)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(value)
    inside = low < number < high if open_ends else low <= number <= high
    if inside and math.isfinite(number):
        return
    wanted = f"between {low} and {high}" if math.isfinite(high) else f"of at least {low}"
    if open_ends:
        wanted = f"above {low}" + (f" and below {high}" if math.isfinite(high) else "")
    raise ArgumentError(f"`{name}` must be a number {wanted}. Received: {name}={value!r}.")


def check_count(name: str, value: Any, low: int) -> None:
    """Refuses what is no whole number or too small.

    Args:
        name: The argument's.
        value: To be checked.
        low: The least value.

    Raises:
        ArgumentError: It must not be that.
    """
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_whole or value < low:
        raise ArgumentError(
            f"`{name}` must be a whole number of at least {low}. Received: {name}={value!r}."
        )
    if value > MOST:
        raise ArgumentError(
            f"`{name}` must be at most 2**53. Received: one of {int(value).bit_length()} bits."
        )


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuses what is of another type.

    Args:
        name: The argument's.
        value: To be checked.
        kinds: The right types.
        wanted: Their names, as a part of a sentence.

    Raises:
        ArgumentError: It is of none of them.
    """
    if not isinstance(value, kinds):
        raise ArgumentError(f"`{name}` must be {wanted}. Received: {name}={value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses what is not among some words.

    Args:
        name: The argument's.
        value: To be checked.
        choices: The words.

    Raises:
        ArgumentError: It is none of them.
    """
    if value not in choices:
        raise ArgumentError(
            f"`{name}` must be one of {tuple(choices)}. Received: {name}={value!r}."
        )
