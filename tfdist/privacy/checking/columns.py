"""Selects, joins and changes the rows of nested arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.data.columns import read_columns

Columns = tuple[Any, Any, Any]


def as_columns(x: Any, y: Any, sample_weight: Any) -> Columns:
    """Returns arrays as `fit` reads them, on the host.

    Args:
        x: As in `fit`.
        y: As in `fit`.
        sample_weight: As in `fit`.
    """
    tensors, _ = read_columns(x, y, sample_weight)
    columns = [tf.nest.map_structure(lambda leaf: leaf.numpy(), column) for column in tensors]
    filled = [*columns, None, None]
    return filled[0], filled[1], filled[2]


def rows_of(columns: Columns) -> int:
    """Counts rows.

    Args:
        columns: `x`, `y` and `sample_weight`.
    """
    return len(tf.nest.flatten(columns[0])[0])


def selected(columns: Columns, rows: Any) -> Columns:
    """Selects rows.

    Args:
        columns: `x`, `y` and `sample_weight`.
        rows: The numbers of the rows.
    """
    some: Columns = mapped(lambda leaf: leaf[np.asarray(rows, np.int64)], columns)
    return some


def joined(parts: Sequence[Columns]) -> Columns:
    """Concatenates rows.

    Args:
        parts: Columns of the same structure.
    """
    flat = [tf.nest.flatten(part) for part in parts]
    leaves = [
        None if leaf[0] is None else np.concatenate(leaf) for leaf in zip(*flat, strict=True)
    ]
    packed: Columns = tf.nest.pack_sequence_as(parts[0], leaves)
    return packed


def mapped(function: Callable[[Any], Any], columns: Any) -> Any:
    """Applies a function to all arrays.

    Args:
        function: A function of an array.
        columns: Nested arrays. None stays None.
    """
    return tf.nest.map_structure(lambda leaf: None if leaf is None else function(leaf), columns)
