"""Reads numbers from environment variables and other texts that a user wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from tfdist.errors import ClusterError

# More would not be a count or a port, and Python refuses to read thousands.
_MOST_DIGITS = 18


def whole_number(text: str) -> int | None:
    """Reads a whole number, 0 or more.

    Args:
        text: The text; spaces around the number are ignored.

    Returns:
        The number, or None if the text is not a whole number of at most 18 digits.

    Example:
        >>> whole_number(" 12"), whole_number("-1"), whole_number("9" * 5000)
        (12, None, None)
    """
    digits = text.strip()
    return int(digits) if digits.isdecimal() and len(digits) <= _MOST_DIGITS else None


def limit_of(name: str, default: float, environ: Mapping[str, str] = os.environ) -> float:
    """Reads the limit of a wait from an environment variable.

    Args:
        name: The environment variable.
        default: Seconds if the variable is not set or empty.
        environ: The environment variables.

    Returns:
        Seconds, 0 or more.

    Raises:
        ClusterError: The variable is not a number of seconds.

    Example:
        >>> limit_of("TFDIST_START_TIMEOUT", 300, {"TFDIST_START_TIMEOUT": "20"})
        20.0
    """
    text = environ.get(name, "")
    if not text.strip():
        return float(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ClusterError(
            f"`{name}` must be a number of seconds, 0 or more. Received: {name}={text[:40]!r}. "
            f"Set it like {name}={default:g}, or unset it."
        )
    return seconds
