"""Counts, selects and joins the rows of nested columns."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Columns = tuple[Any, Any, Any]


def count(x: Any) -> int:
    """Counts the rows of columns.

    Args:
        x: Nested columns.
    """
    leaf = tf.nest.flatten(x)[0]
    return int(leaf.shape[0])


def selected(columns: Columns, rows: Any) -> Columns:
    """Selects rows.

    Args:
        columns: Nested columns. None stays None.
        rows: The numbers of the rows.
    """
    gathered: Columns = tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.gather(leaf, rows), columns
    )
    return gathered


def joined(*several: Columns) -> Columns:
    """Concatenates rows.

    Args:
        *several: Columns of the same structure.
    """
    concatenated: Columns = tf.nest.map_structure(
        lambda *parts: None if parts[0] is None else tf.concat(parts, 0), *several
    )
    return concatenated
