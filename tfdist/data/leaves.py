"""Leaves of a batch, dense, sparse or ragged: how they are read, and rows of them taken."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

Tensor = Any


class SparseRows:
    """A sparse tensor of which any rows can be gathered, in any order.

    Args:
        tensor: A `tf.SparseTensor` of rank 2 or more.

    Attributes:
        shape: Of the tensor, as a `tf.TensorShape`.
        dtype: Of the tensor.
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
        """Gives rows, one below the other.

        Args:
            rows: int64 of shape [number of rows].

        Returns:
            A `tf.SparseTensor`.
        """
        where, values = tf.gather(self._where, rows), tf.gather(self._values, rows)
        indices = tf.concat([where.value_rowids()[:, None], where.flat_values], 1)
        shape = _sized(tf.size(rows, tf.int64), self)
        return tf.SparseTensor(indices, values.flat_values, shape)


def is_scipy(value: Any) -> bool:
    """Tells a sparse matrix of SciPy, of any format, from other values.

    Args:
        value: Anything.
    """
    return type(value).__module__.startswith("scipy.sparse") and hasattr(value, "tocsr")


def is_composite(value: Any) -> bool:
    """Tells what is sparse or ragged, or describes it, from other values.

    Args:
        value: Anything.
    """
    sparse = tf.SparseTensor | tf.SparseTensorSpec | SparseRows
    return is_scipy(value) or isinstance(value, sparse | tf.RaggedTensor | tf.RaggedTensorSpec)


def is_dense(leaf: Any) -> bool:
    """Tells a plain tensor from sparse and ragged ones.

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
        matrix = value.tocsr().tocoo()  # of which equal places are summed up
        where = tf.stack([tf.cast(axis, tf.int64) for axis in (matrix.row, matrix.col)], 1)
        value = tf.SparseTensor(where, matrix.data, matrix.shape)
    return tf.cast(value, keras.config.floatx()) if value.dtype.is_floating else value


def count(leaf: Tensor) -> Tensor:
    """Counts rows.

    Args:
        leaf: Of a batch.

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
    """Takes rows that follow each other.

    Args:
        leaf: Of a batch.
        begin: The first.
        end: The one after the last.
    """
    if not isinstance(leaf, tf.SparseTensor):
        return leaf[begin:end]
    size = _sized(end - begin, leaf)
    start = tf.concat([[begin], tf.zeros_like(size[1:])], 0)
    part = tf.sparse.slice(leaf, start, size)
    return tf.SparseTensor(part.indices, part.values, size)


def _sized(count: Tensor, like: Any) -> Tensor:
    """Gives the shape of a sparse tensor with other rows; what is known of it stays so."""
    known = like.shape[1:].is_fully_defined()
    rest = tf.constant(like.shape.as_list()[1:], tf.int64) if known else like.dense_shape[1:]
    return tf.concat([count[None], rest], 0)


def sized(leaf: Tensor, count: int | None) -> Tensor:
    """Says how many rows a dense leaf has, where that is known before it is drawn.

    Args:
        leaf: Of a batch; sparse and ragged ones stay as they are.
        count: Its rows, or None.
    """
    if count is None or not is_dense(leaf):
        return leaf
    return tf.ensure_shape(leaf, tf.TensorShape([count]).concatenate(leaf.shape[1:]))


def blank(column: Any) -> Any:
    """Gives one row that counts nothing.

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
    """Gives the plain tensors that leaves are made of.

    Args:
        structure: Of leaves, or of what describes them.
    """
    made: list[Tensor] = tf.nest.flatten(structure, expand_composites=True)
    return made


def content(leaf: Tensor) -> bytes:
    """Gives what a leaf holds, the same in every process that holds the same.

    Args:
        leaf: A tensor of any kind, with values.
    """
    found = []
    for part in components(leaf):
        values = part.numpy()
        text = values.dtype == object  # of which tobytes() would give addresses
        found.append(repr(values.tolist()).encode() if text else values.tobytes())
    return b"".join(found)


def spec(leaf: Any, count: int | None = None) -> Any:
    """Describes batches that a leaf's rows make up.

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
