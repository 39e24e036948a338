"""Rows of nested columns: taken, joined, counted."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Columns = tuple[Any, Any, Any]


def count(x: Any) -> int:
    """Counts the rows of columns.

    Args:
        x: Columns, nested.
    """
    leaf = tf.nest.flatten(x)[0]
    return int(leaf.shape[0])


def taken(columns: Columns, rows: Any) -> Columns:
    """Takes rows by their places.

    Args:
        columns: Nested; None stays.
        rows: The places.
    """
    found: Columns = tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.gather(leaf, rows), columns
    )
    return found


def joined(*several: Columns) -> Columns:
    """Lays rows one behind the other.

    Args:
        *several: Columns of the same structure.
    """
    found: Columns = tf.nest.map_structure(
        lambda *parts: None if parts[0] is None else tf.concat(parts, 0), *several
    )
    return found
