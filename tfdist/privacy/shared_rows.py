"""Finds rows of the training data in other data, such as those of validation."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import data

_ROWS_SOUGHT = 200
_AT_ONCE = 4096
_PART_OF_CERTAIN = 0.05
_PART_ABOVE_CHANCE = 0.25

# Columns of the sought rows, and of the data: two arrays of shape [rows, columns]. The first
# has the type in which both are compared.
_Pair = tuple[Any, Any]


def has_rows_of(some: Any, x: Any) -> bool:
    """Returns whether data share memory or rows with the training data.

    Of a stream, the first batch is looked at.

    Args:
        some: Arrays, a `tf.data.Dataset` or a `PyDataset`.
        x: The training data, as in `fit`.
    """
    return _overlap(some, x) or are_rows_of(_rows_at_first(some), _rows_at_first(x))


def are_rows_of(some: Any, x: Any) -> bool:
    """Returns whether more rows are also rows of `x` than by chance.

    Up to 200 rows are searched. Rows with few possible values are equal by chance. So a row
    counts at once only if each half of its columns occurs in `x` only where the whole row does,
    and 5 % of such rows are enough. All rows count in a second way: at least a quarter more of
    them must be found than rows of `x` come twice in `x`, which estimates how many a new row
    would find by chance.

    Args:
        some: Arrays of rows, nested as `x`.
        x: Arrays. For other data the result is False.
    """
    pairs = _pairs(some, x)
    if not pairs:
        return False
    matches = _counts(pairs)
    halves = [_half(pairs, first) for first in (0, 1)]
    if all(halves):
        counts = zip(matches, *map(_counts, halves), strict=True)
        certain = sum(
            of_row > 0 and of_row == of_half == of_other_half
            for of_row, of_half, of_other_half in counts
        )
        if certain >= max(1, _PART_OF_CERTAIN * len(matches)):
            return True
    matches_within = _counts(
        [(x_rows[_spread(x_rows)].astype(rows.dtype), x_rows) for rows, x_rows in pairs]
    )
    chance = sum(count > 1 for count in matches_within) / len(matches_within)
    margin = 3 * math.sqrt(len(matches) * chance * (1 - chance))
    threshold = len(matches) * chance + max(margin, _PART_ABOVE_CHANCE * len(matches))
    return sum(count > 0 for count in matches) >= max(1, threshold)


def _pairs(some: Any, x: Any) -> list[_Pair]:
    """Returns rows of `some` and all rows of `x`, or nothing if they cannot be compared."""
    if some is None or x is None or not (data.is_arrays(some) and data.is_arrays(x)):
        return []
    leaves, x_leaves = tf.nest.flatten(some), tf.nest.flatten(x)
    if len(leaves) != len(x_leaves) or any(map(data.is_composite, [*leaves, *x_leaves])):
        return []
    pairs: list[_Pair] = []
    for leaf, x_leaf in zip(map(np.asarray, leaves), map(np.asarray, x_leaves), strict=True):
        if object in (leaf.dtype, x_leaf.dtype) or not (leaf.ndim and x_leaf.ndim):
            return []
        if leaf.shape[1:] != x_leaf.shape[1:] or not (leaf.size and x_leaf.size):
            return []
        rows = leaf[_spread(leaf)].astype(_common_type(leaf.dtype, x_leaf.dtype))
        pairs.append((rows.reshape(len(rows), -1), x_leaf.reshape(len(x_leaf), -1)))
    lengths = {(len(rows), len(x_rows)) for rows, x_rows in pairs}
    return pairs if len(lengths) == 1 else []


def _spread(rows: Any) -> Any:
    """Returns the numbers of up to 200 rows from all parts of an array."""
    return np.unique(np.linspace(0, len(rows) - 1, _ROWS_SOUGHT).astype(int))


def _common_type(first: Any, second: Any) -> Any:
    """Returns a type in which numbers stay equal if one was rounded to the other's type."""
    if first.kind in "US" or second.kind in "US":
        return np.result_type(first, second)
    floats = [kind for kind in (first, second) if tf.as_dtype(kind).is_floating]
    if len(floats) == 2:
        floats.append(np.dtype(keras.config.floatx()))
    return min(floats, key=lambda kind: kind.itemsize, default=np.result_type(first, second))


def _half(pairs: Sequence[_Pair], first: int) -> list[_Pair]:
    """Returns every second column of all columns."""
    half: list[_Pair] = []
    for rows, x_rows in pairs:
        if first < rows.shape[1]:
            half.append((rows[:, first::2], x_rows[:, first::2]))
        first = (first + rows.shape[1]) % 2
    return half


def _counts(pairs: Sequence[_Pair]) -> list[int]:
    """Returns for each sought row how many rows of the data are equal to it."""
    candidates = _candidates(pairs)
    counts: collections.Counter[bytes] = collections.Counter()
    for begin in range(0, len(candidates), _AT_ONCE):
        numbers = candidates[begin : begin + _AT_ONCE]
        counts.update(_bytes([x_rows[numbers].astype(rows.dtype) for rows, x_rows in pairs]))
    return [counts[row] for row in _bytes([rows for rows, _ in pairs])]


def _bytes(parts: Sequence[Any]) -> list[bytes]:
    rows = len(parts[0])
    # Both zeros of floats are one number, and have other bytes.
    parts = [
        part if part.dtype.kind in "US" else np.where(part == 0, 0, part) for part in parts
    ]
    parts = [np.ascontiguousarray(part).view(np.uint8).reshape(rows, -1) for part in parts]
    joined = np.concatenate(parts, 1)
    buffer, width = joined.tobytes(), joined.shape[1]
    return [buffer[row * width : (row + 1) * width] for row in range(rows)]


def _candidates(pairs: Sequence[_Pair]) -> Any:
    """Returns the numbers of rows of the data that agree with some row in three columns.

    The three columns have the most different values of 64. This is a quick first selection.
    """
    columns = [(pair, column) for pair in pairs for column in range(pair[0].shape[1])]
    spread = np.unique(np.linspace(0, len(columns) - 1, 64).astype(int))
    sample = [columns[number] for number in spread]
    sample.sort(key=lambda place: -len(np.unique(place[0][0][:, place[1]])))
    may_match = np.ones(len(pairs[0][1]), bool)
    for (rows, x_rows), column in sample[:3]:
        may_match &= np.isin(x_rows[:, column].astype(rows.dtype), rows[:, column])
    return np.flatnonzero(may_match)


def _rows_at_first(x: Any) -> Any:
    """Returns arrays as they are, or the inputs of a stream's first batch, or None."""
    if isinstance(x, tf.data.Dataset):
        batch = next(iter(x), None)
    elif isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    else:
        return x
    inputs = None if batch is None else keras.utils.unpack_x_y_sample_weight(batch)[0]
    if any(map(data.is_composite, tf.nest.flatten(inputs))):
        return None
    return tf.nest.map_structure(np.asarray, inputs)


def _overlap(first: Any, second: Any) -> bool:
    """Returns whether arrays share memory, or any two leaves are the same object."""
    for a in tf.nest.flatten(first):
        for b in tf.nest.flatten(second):
            if a is b:
                return True
            if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
                try:
                    if np.shares_memory(a, b, max_work=1000):  # type: ignore[arg-type]
                        return True
                except np.exceptions.TooHardError:
                    continue
    return False
