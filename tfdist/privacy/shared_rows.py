"""Finds rows of the training data in other data, such as those of validation."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import data

_ROWS_SOUGHT = 200
_ROWS_OF_STREAM = 2**17
_AT_ONCE = 4096
_PART_OF_CERTAIN = 0.05
_PART_ABOVE_CHANCE = 0.25

# Columns of the sought rows, and of the data: two arrays of shape [rows, columns]. The first
# has the type in which both are compared.
_Pair = tuple[Any, Any]


def has_rows_of(some: Any, x: Any) -> bool:
    """Returns whether data share memory or rows with the training data.

    Args:
        some: Arrays, a `tf.data.Dataset` or a `PyDataset`. Of a stream, the first batch is
            looked at.
        x: The training data, as in `fit`. Of a stream, up to 131072 rows are looked at.
    """
    sought = next(_chunks(some), None)
    return _overlap(some, x) or (sought is not None and _are_rows_of(sought, _chunks(x)))


def can_compare(*sources: Any) -> bool:
    """Returns whether all of these can be read more than once: a generator cannot.

    Args:
        *sources: Data as in `fit`.
    """
    streams = keras.utils.PyDataset, tf.data.Dataset
    return all(isinstance(each, streams) or data.is_arrays(each) for each in sources)


def are_rows_of(some: Any, x: Any) -> bool:
    """Returns whether more rows are also rows of `x` than by chance.

    Up to 200 rows are searched. Rows with few possible values are equal by chance. So a row
    counts at once only if each half of its columns occurs in `x` only where the whole row does,
    and 5 % of such rows are enough. All rows count in a second way: at least a quarter more of
    them must be found than rows of `x` come twice in `x`, which estimates how many a new row
    would find by chance.

    Args:
        some: Arrays of rows, nested as `x`. Of dicts, the keys of both are compared.
        x: Arrays. For other data the result is False.
    """
    return _are_rows_of(some, [x])


def _are_rows_of(some: Any, chunks: Iterable[Any]) -> bool:
    counts: list[list[int]] = []
    number, chance = 0, 0.0
    for chunk in chunks:
        pairs = _pairs(some, chunk)
        if not pairs:
            return False
        halves = [_half(pairs, first) for first in (0, 1)]
        of_chunk = [_counts(part) for part in (pairs, *halves) if part]
        if not counts:
            counts, number = of_chunk, len(of_chunk[0])
            chance = _chance(pairs)
        else:
            counts = [
                [one + more for one, more in zip(before, added, strict=True)]
                for before, added in zip(counts, of_chunk, strict=True)
            ]
    if not counts:
        return False
    matches, *of_halves = counts
    if len(of_halves) == 2:
        rows = zip(*counts, strict=True)
        certain = sum(of_row > 0 and {of_row} == {*rest} for of_row, *rest in rows)
        if certain >= max(1, _PART_OF_CERTAIN * number):
            return True
    margin = 3 * math.sqrt(number * chance * (1 - chance))
    threshold = number * chance + max(margin, _PART_ABOVE_CHANCE * number)
    return sum(count > 0 for count in matches) >= max(1, threshold)


def _chance(pairs: Sequence[_Pair]) -> float:
    """Estimates how likely a new row is equal to one of the data."""
    within = [(x_rows[_spread(x_rows)].astype(rows.dtype), x_rows) for rows, x_rows in pairs]
    counts = _counts(within)
    return sum(count > 1 for count in counts) / len(counts)


def _pairs(some: Any, x: Any) -> list[_Pair]:
    """Returns rows of `some` and all rows of `x`, or nothing if they cannot be compared."""
    if some is None or x is None or not (data.is_arrays(some) and data.is_arrays(x)):
        return []
    if isinstance(some, Mapping) and isinstance(x, Mapping):  # Keras ignores other keys
        common = some.keys() & x.keys()
        some, x = ({key: part[key] for key in common} for part in (some, x))
    leaves, x_leaves = tf.nest.flatten(some), tf.nest.flatten(x)
    if len(leaves) != len(x_leaves) or any(map(data.is_composite, [*leaves, *x_leaves])):
        return []
    pairs: list[_Pair] = []
    for leaf, x_leaf in zip(map(_plain, leaves), map(_plain, x_leaves), strict=True):
        if object in (leaf.dtype, x_leaf.dtype) or not (leaf.ndim and x_leaf.ndim):
            return []
        if not (leaf.size and x_leaf.size):
            return []
        rows = leaf[_spread(leaf)].astype(_common_type(leaf.dtype, x_leaf.dtype))
        rows, x_rows = rows.reshape(len(rows), -1), x_leaf.reshape(len(x_leaf), -1)
        if rows.shape[1] != x_rows.shape[1]:  # Keras adds and removes axes of length 1
            return []
        pairs.append((rows, x_rows))
    lengths = {(len(rows), len(x_rows)) for rows, x_rows in pairs}
    return pairs if len(lengths) == 1 else []


def _plain(leaf: Any) -> Any:
    """Returns an array of numbers or of UTF-8 texts, or of objects if it has neither."""
    array = np.asarray(leaf)
    if array.dtype.kind == "U":
        return np.char.encode(array, "utf-8")
    if array.dtype != object:
        return array
    values = array.ravel().tolist()
    if all(isinstance(value, str | bytes) for value in values):
        texts = [v.encode() if isinstance(v, str) else v for v in values]
        return np.array(texts, np.bytes_).reshape(array.shape)
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError):
        return array


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


def _chunks(x: Any) -> Iterator[Any]:
    """Lists arrays as they are, or the inputs of a stream's batches."""
    if isinstance(x, keras.utils.PyDataset):
        batches: Iterator[Any] = (x[number] for number in range(x.num_batches or 1))
    elif isinstance(x, tf.data.Dataset):
        batches = iter(x)
    else:
        yield x
        return
    rows, group = 0, 1
    parts: list[Any] = []
    for batch in batches:
        inputs = keras.utils.unpack_x_y_sample_weight(batch)[0]
        if any(map(data.is_composite, tf.nest.flatten(inputs))):
            return
        parts.append(tf.nest.map_structure(np.asarray, inputs))
        rows += len(np.atleast_1d(tf.nest.flatten(parts[-1])[0]))
        if rows >= group:  # the first batch by itself: of validation data, nothing else is read
            yield _together(parts)
            parts, group = [], rows + _AT_ONCE
        if rows >= _ROWS_OF_STREAM:
            return
    if parts:
        yield _together(parts)


def _together(parts: Sequence[Any]) -> Any:
    """Concatenates batches."""
    return tf.nest.map_structure(lambda *leaves: np.concatenate(leaves), *parts)


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
