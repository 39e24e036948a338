"""Converts the arrays that `fit` was given to tensors with equally many rows."""

from __future__ import annotations

from numbers import Number
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.data import leaves
from tfdist.data.source import shortened
from tfdist.errors import ArgumentError


def to_tensors(structure: Any, name: str) -> Any:
    """Converts a nested structure of arrays to tensors on the host, floats to `floatx()`.

    Args:
        structure: Nested dicts, lists and tuples of NumPy arrays, tensors, pandas frames or
            sparse matrices of SciPy.
        name: The argument's name, for messages.

    Returns:
        The structure with tuples in place of lists. Its leaves are `tf.Tensor`,
        `tf.RaggedTensor` or `SparseRows`.

    Raises:
        ArgumentError: A leaf is not an array, or has no dimension of rows.
    """
    if is_values(structure):
        raise ArgumentError(
            f"`{name}` must be an array, or a dict, list or tuple of arrays. "
            f"Received: {name}={shortened(structure)}, a {type(structure).__name__} of "
            f"{kind_of_values(structure)}. Pass np.array({name})."
        )
    if isinstance(structure, dict):
        return {key: to_tensors(value, f"{name}[{key!r}]") for key, value in structure.items()}
    if isinstance(structure, list | tuple):
        return tuple(to_tensors(v, f"{name}[{i}]") for i, v in enumerate(structure))
    array = structure
    if type(array).__module__.startswith("pandas.") and hasattr(array, "to_numpy"):
        array = array.to_numpy()
        array = array[:, None] if array.ndim == 1 else array  # as Keras reads a Series
    if leaves.is_composite(array):
        with tf.device("CPU:0"):
            tensor = leaves.composite(array)
            return leaves.SparseRows(tensor) if isinstance(tensor, tf.SparseTensor) else tensor
    if not is_array(array):
        raise ArgumentError(
            f"`{name}` must be an array, or a dict, list or tuple of arrays. "
            f"Received: {name}={shortened(structure)}. Convert it with np.asarray."
        )
    with tf.device("CPU:0"):
        tensor = tf.convert_to_tensor(array if tf.is_tensor(array) else np.asarray(array))
        if tensor.dtype.is_floating:
            tensor = tf.cast(tensor, keras.config.floatx())
    if tensor.shape.rank == 0:
        raise ArgumentError(
            f"`{name}` must have a first dimension of examples. Received: {name} with shape ()."
        )
    return tensor


def is_array(value: Any) -> bool:
    """Returns whether a value is an array, of any library.

    Args:
        value: Anything.
    """
    if tf.is_tensor(value) or leaves.is_composite(value):
        return True
    return hasattr(value, "__array__") and hasattr(value, "shape")


def is_values(structure: Any) -> bool:
    """Returns whether a value is a nested list of numbers or texts.

    Keras would take such a list for several inputs.

    Args:
        structure: Anything.
    """
    if not isinstance(structure, list | tuple):
        return False
    leaves = tf.nest.flatten(structure)
    return bool(leaves) and all(isinstance(leaf, str | bytes | Number) for leaf in leaves)


def kind_of_values(structure: Any) -> str:
    """Names the kind of values in a list.

    Args:
        structure: A list for which `is_values` is True.
    """
    is_number = all(isinstance(leaf, Number) for leaf in tf.nest.flatten(structure))
    return "numbers" if is_number else "texts"


def is_arrays(structure: Any) -> bool:
    """Returns whether an input is arrays, nested or not, rather than an iterable of batches.

    Args:
        structure: The user's `x`.
    """
    leaves = tf.nest.flatten(structure)
    return bool(leaves) and all(
        is_array(leaf) or type(leaf).__module__.startswith("pandas.") for leaf in leaves
    )


def read_columns(
    x: Any, y: Any, sample_weight: Any, may_be_empty: bool = False
) -> tuple[tuple[Any, ...], int]:
    """Converts the arguments of `fit` to tensors, in the structure of a batch.

    Args:
        x: Arrays.
        y: Targets, or None.
        sample_weight: Weights, or None.
        may_be_empty: Whether there may be no examples.

    Returns:
        `(x,)`, `(x, y)` or `(x, y, sample_weight)`, and the number of examples.

    Raises:
        ArgumentError: The arguments are not arrays, or do not fit together.
    """
    arguments = {"x": x, "y": y, "sample_weight": sample_weight}
    columns = {n: to_tensors(c, n) for n, c in arguments.items() if c is not None}
    rows = count_rows(may_be_empty, **columns)
    if sample_weight is not None and y is None:
        raise ArgumentError("`sample_weight` must come with `y`. Received: y=None.")
    return tuple(columns.values()), rows


def count_rows(may_be_empty: bool = False, /, **columns: Any) -> int:
    """Counts the examples of tensors that must have equally many.

    Args:
        may_be_empty: Whether there may be no examples.
        **columns: Nested structures of tensors by the name of their argument; None is
            skipped.

    Raises:
        ArgumentError: The counts differ, or there are no examples.
    """
    counts = {
        name: sorted({int(leaf.shape[0]) for leaf in tf.nest.flatten(column)})
        for name, column in columns.items()
        if column is not None
    }
    distinct = {count for row_counts in counts.values() for count in row_counts}
    received = ", ".join(
        f"{name} with {row_counts} rows" for name, row_counts in counts.items()
    )
    if len(distinct) > 1:
        raise ArgumentError(
            f"All arrays must have the same number of rows. Received: {received}."
        )
    if distinct == {0} and not may_be_empty:
        raise ArgumentError(
            f"There must be at least one example. Received: {received}. "
            "Check the filter or the path that produced the data."
        )
    return distinct.pop()


def split(
    x: Any, y: Any, sample_weight: Any, fraction: float, may_be_empty: bool = False
) -> tuple[Any, Any]:
    """Splits off the last rows for validation, as Keras does.

    Args:
        x: Arrays.
        y: Targets, or None.
        sample_weight: Weights, or None.
        fraction: The part to split off, between 0 and 1.
        may_be_empty: Whether a part may have no rows.

    Returns:
        `(x, y, sample_weight)` to train on, and the same to validate on.

    Raises:
        ArgumentError: The input is not arrays, or a part would be empty.
    """
    if not is_arrays(x):
        raise ArgumentError(
            "`validation_split` needs arrays. Received: x of type "
            f"{type(x).__name__}. Pass validation_data instead."
        )
    columns = [
        None if c is None else to_tensors(c, n)
        for c, n in ((x, "x"), (y, "y"), (sample_weight, "sample_weight"))
    ]
    rows = count_rows(may_be_empty, x=columns[0], y=columns[1], sample_weight=columns[2])
    # Keras's expression: another order of the float operations could split one row apart.
    at = int(rows * (1.0 - fraction))
    if not 0 < at < rows and not may_be_empty:
        raise ArgumentError(
            "`validation_split` must leave examples to train and to validate on. "
            f"Received: validation_split={fraction} with {rows} examples."
        )

    def part(begin: int, end: int) -> Any:
        numbers = tf.range(begin, end, dtype=tf.int64)
        return tuple(
            c
            if c is None
            else tf.nest.map_structure(lambda leaf: leaves.gather(leaf, numbers), c)
            for c in columns
        )

    return part(0, at), part(at, rows)
