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


def of_any_size(leaf: Any) -> Any:
    """Describes a column of any number of rows.

    Args:
        leaf: One of some rows.
    """
    spec = tf.type_spec_from_value(leaf)
    if isinstance(spec, tf.TensorSpec):
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
    shape = [None, *spec.shape[1:]]
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensorSpec(shape, spec.dtype)
    return tf.RaggedTensorSpec(shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
