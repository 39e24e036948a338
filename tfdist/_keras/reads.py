"""Notes which `keras.Variable`s are read, as steps and metrics do it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_current = threading.local()


@contextlib.contextmanager
def noting_reads(notes: bool = True) -> Iterator[dict[int, Any]]:
    """Makes a context in which reads of `keras.Variable`s are noted, in this thread.

    Args:
        notes: Whether they are noted. False ends it for a part of such a context.

    Yields:
        The variables that are read, by id.
    """
    before = getattr(_current, "reads", None)
    reads: dict[int, Any] = {}
    _current.reads = reads if notes else None
    try:
        yield reads
    finally:
        _current.reads = before


def note_read(variable: Any) -> None:
    """Records a `keras.Variable` that is about to be read, if the context asks for it.

    Args:
        variable: The `keras.Variable`.
    """
    reads: dict[int, Any] | None = getattr(_current, "reads", None)
    if reads is not None:
        reads[id(variable)] = variable
