"""Reads JSON that a stranger may have sent: with limits, and nothing but standard JSON."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, NoReturn

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(set(range(256)) - _STEP.keys())


def loads(content: bytes, most_bytes: int, most_depth: int = 8, allow_nan: bool = False) -> Any:
    """Reads a text of JSON.

    Python's own reader fails on deep nesting with a `RecursionError`. It accepts NaN and halves
    of characters, which fail later, where they are used.

    Args:
        content: The text, in UTF-8.
        most_bytes: The largest length that is read.
        most_depth: The deepest nesting of lists and objects that is read.
        allow_nan: Whether NaN and infinite numbers are read, which Python writes.

    Returns:
        The value.

    Raises:
        ValueError: The text is too long, too deep, or no JSON.

    Example:
        >>> loads(b'{"a": [1]}', most_bytes=100)
        {'a': [1]}
    """
    if len(content) > most_bytes:
        raise ValueError(f"more than {most_bytes} bytes")
    brackets = _STRING.sub(b"", content).translate(None, _NO_BRACKETS)
    if max(itertools.accumulate(map(_STEP.__getitem__, brackets)), default=0) > most_depth:
        raise ValueError(f"nested more than {most_depth} deep")
    value = json.loads(content.decode(), parse_constant=float if allow_nan else _no_number)
    # Halves of characters, and numbers that are too large, are a ValueError here.
    json.dumps(value, ensure_ascii=False, allow_nan=allow_nan).encode()
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
