"""Parameters of tests of which `make test` uses a part."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def in_part(values: Iterable[Any], *, full: Collection[Any]) -> list[Any]:
    """Gives all values as parameters, some of them for `make test-full` only.

    Args:
        values: Of a test's parameter; each is hashable.
        full: Those for `make test-full`: what they combine is tested one by one.
    """
    values = list(values)
    assert set(full) <= set(values), full
    return [
        pytest.param(value, marks=pytest.mark.full if value in full else ()) for value in values
    ]
