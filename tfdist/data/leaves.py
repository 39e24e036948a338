"""Leaves of a batch, dense, sparse or ragged: reads them, and takes rows of them."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

Tensor = Any


class SparseRows:
    """A sparse tensor from which any rows can be gathered, in any order.

    Args:
        tensor: A `tf.SparseTensor` of rank 2 or more.

    Attributes:
        shape: The tensor's shape, a `tf.TensorShape`.
        dtype: The tensor's dtype.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tf.sparse.reorder(tensor)
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        entries = tensor.indices[:, 1:], tensor.values
        ids, count = tensor.indices[:, 0], tensor.dense_shape[0]
        self._where, self._values = (
            tf.RaggedTensor.from_value_rowids(entry, ids, count) for entry in entries
        )

    def gather(self, rows: Tensor) -> Tensor:
        """Gathers rows.

        Args:
            rows: int64 of shape [number of rows].

        Returns:
            A `tf.SparseTensor`.
        """
        where, values = tf.gather(self._where, rows), tf.gather(self._values, rows)
        indices = tf.concat([where.value_rowids()[:, None], where.flat_values], 1)
        shape = _shape_with_rows(tf.size(rows, tf.int64), self)
        return tf.SparseTensor(indices, values.flat_values, shape)


def is_scipy(value: Any) -> bool:
    """Returns whether a value is a sparse matrix of SciPy, of any format.

    Args:
        value: Anything.
    """
    return type(value).__module__.startswith("scipy.sparse") and hasattr(value, "tocsr")


def is_composite(value: Any) -> bool:
    """Returns whether a value is a sparse or ragged tensor, or describes one.

    Args:
        value: Anything.
    """
    sparse = tf.SparseTensor | tf.SparseTensorSpec | SparseRows
    return is_scipy(value) or isinstance(value, sparse | tf.RaggedTensor | tf.RaggedTensorSpec)


def is_dense(leaf: Any) -> bool:
    """Returns whether a leaf is a plain tensor, neither sparse nor ragged.

    Args:
        leaf: A column.
    """
    return isinstance(leaf, tf.Tensor)


def composite(value: Any) -> Tensor:
    """Reads a sparse or ragged leaf, floats as `floatx()`.

    Args:
        value: A `tf.SparseTensor`, a `tf.RaggedTensor` or a sparse matrix of SciPy.

    Returns:
        A `tf.SparseTensor` or a `tf.RaggedTensor`.
    """
    if is_scipy(value):
        matrix = value.tocsr().tocoo()  # sums up entries of the same position
        where = tf.stack([tf.cast(axis, tf.int64) for axis in (matrix.row, matrix.col)], 1)
        value = tf.SparseTensor(where, matrix.data, matrix.shape)
    return tf.cast(value, keras.config.floatx()) if value.dtype.is_floating else value


def count(leaf: Tensor) -> Tensor:
    """Counts rows.

    Args:
        leaf: A leaf of a batch.

    Returns:
        Scalar int64.
    """
    ragged = isinstance(leaf, tf.RaggedTensor)
    return tf.cast(leaf.nrows() if ragged else tf.shape(leaf)[0], tf.int64)


def gather(column: Any, rows: Tensor) -> Tensor:
    """Takes rows by number.

    Args:
        column: A dense or ragged tensor, or `SparseRows`.
        rows: int64 of shape [number of rows].
    """
    return column.gather(rows) if isinstance(column, SparseRows) else tf.gather(column, rows)


def cut(leaf: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Takes adjacent rows.

    Args:
        leaf: A leaf of a batch.
        begin: The first row.
        end: The row after the last one.
    """
    if not isinstance(leaf, tf.SparseTensor):
        return leaf[begin:end]
    size = _shape_with_rows(end - begin, leaf)
    start = tf.concat([[begin], tf.zeros_like(size[1:])], 0)
    part = tf.sparse.slice(leaf, start, size)
    return tf.SparseTensor(part.indices, part.values, size)


def _shape_with_rows(count: Tensor, like: Any) -> Tensor:
    """Returns the shape of a sparse tensor with another number of rows, static if it can."""
    is_static = like.shape[1:].is_fully_defined()
    rest = (
        tf.constant(like.shape.as_list()[1:], tf.int64) if is_static else like.dense_shape[1:]
    )
    return tf.concat([count[None], rest], 0)


def with_num_rows(leaf: Tensor, count: int | None) -> Tensor:
    """Gives a dense leaf a static number of rows, if the number is known in advance.

    Args:
        leaf: A leaf of a batch; sparse and ragged leaves do not change.
        count: The number of rows, or None if unknown.
    """
    if count is None or not is_dense(leaf):
        return leaf
    return tf.ensure_shape(leaf, tf.TensorShape([count]).concatenate(leaf.shape[1:]))


def blank(column: Any) -> Any:
    """Returns one padding row.

    Args:
        column: As in `gather`, without rows.
    """
    if isinstance(column, tf.RaggedTensor):
        return tf.RaggedTensor.from_row_lengths(column.values, [0])
    shape = [1, *column.shape[1:]]
    if isinstance(column, SparseRows):
        nothing = tf.zeros([0, len(shape)], tf.int64), tf.zeros([0], column.dtype)
        return SparseRows(tf.SparseTensor(*nothing, shape))
    return tf.zeros(shape, column.dtype)


def components(structure: Any) -> list[Tensor]:
    """Returns the plain tensors of which leaves consist.

    Args:
        structure: A structure of leaves or of their descriptions.
    """
    tensors: list[Tensor] = tf.nest.flatten(structure, expand_composites=True)
    return tensors


def content(leaf: Tensor) -> bytes:
    """Returns a leaf's values as bytes, the same in every process that has the same values.

    Args:
        leaf: A tensor of any kind, with values.
    """
    contents = []
    for part in components(leaf):
        values = part.numpy()
        text = values.dtype == object  # tobytes() would return addresses
        contents.append(repr(values.tolist()).encode() if text else values.tobytes())
    return b"".join(contents)


def spec(leaf: Any, count: int | None = None) -> Any:
    """Describes batches of a leaf's rows.

    Args:
        leaf: A tensor or array of shape [rows, ...], or `SparseRows`.
        count: Rows of a batch, or None for any number.
    """
    shape = (count, *leaf.shape[1:])
    if isinstance(leaf, SparseRows | tf.SparseTensor):
        return tf.SparseTensorSpec(shape, leaf.dtype)
    if isinstance(leaf, tf.RaggedTensor):
        return tf.RaggedTensorSpec(shape, leaf.dtype, leaf.ragged_rank, leaf.row_splits.dtype)
    return tf.TensorSpec(shape, leaf.dtype)
