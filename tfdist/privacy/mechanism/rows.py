"""Counts, selects and joins the rows of nested columns."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfdist._keras import layers as keras_layers

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


def first(rows: Any, *structures: Any) -> Any:
    """Cuts tensors and their masks to their first rows.

    Args:
        rows: The number of rows, a scalar. At least one row is left.
        *structures: Nested tensors. None stays None.
    """
    rows = tf.maximum(tf.cast(rows, tf.int32), 1)

    def cut(leaf: Any) -> Any:
        if leaf is None:
            return None
        first = leaf[:rows]
        if keras_layers.has_mask(leaf):
            keras_layers.give_mask(first, keras_layers.mask_of(leaf)[:rows])
        return first

    return tf.nest.map_structure(cut, structures)
