"""Finds examples that a `tf.data.Dataset` has several times, in its sources."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist._keras import dataset_files

# Names of dataset classes.
SOURCES = frozenset(
    {
        "FixedLengthRecordDatasetV2", "TFRecordDatasetV2", "TextLineDatasetV2", "_ListDataset",
        "_LoadDataset", "_SparseTensorSliceDataset", "_TensorDataset", "_TensorSliceDataset",
    }
)  # fmt: skip
_FEW_ROWS = 16
_SHARE = 100  # two sources overlap if more than one row in so many is in both


class Sources:
    """The sources of a dataset, collected while it is walked through.

    Attributes:
        paths: The paths, or inode numbers, of its files.
        most_rows: The length of the longest source of arrays, 0 if it is short.
    """

    def __init__(self) -> None:
        self.paths: set[Hashable] = set()
        self.most_rows = 0
        self._caches: set[Hashable] = set()
        self._all: list[Any] = []

    def has_rows_of(self, source: Any) -> bool:
        """Returns whether a source has elements of an earlier one, and adds it to them.

        Args:
            source: The source.
        """
        is_repeated = any(
            _is_same(source, earlier) or _overlap(source, earlier) for earlier in self._all
        )
        self._all.append(source)
        count = int(source.cardinality())
        if type(source).__name__ == "_TensorSliceDataset" and count >= _FEW_ROWS:
            self.most_rows = max(self.most_rows, count)
        return is_repeated

    def has_files_of(self, source: Any, read: bool) -> bool:
        """Returns whether a source names a file twice, or one of an earlier source.

        Args:
            source: The source.
            read: Whether a later function reads files.
        """
        names = vars(source).get("_filenames")
        if isinstance(names, tf.data.Dataset):
            return dataset_files.names_twice(names, self.paths)
        path = vars(source).get("_path")
        if path is not None:
            return dataset_files.is_seen(_bytes(path), self.paths)
        for tensor in tf.nest.flatten(vars(source).get("_tensors", [])) if read else []:
            if tensor.dtype == tf.string and tensor.shape.rank == 1:
                names = tensor.numpy().tolist()
                # Texts may be anything. They count as files if the first one is the name of a
                # file.
                if names and os.path.exists(names[0]):
                    return any(dataset_files.is_seen(name, self.paths) for name in names)
        return False

    def is_cached_before(self, dataset: Any) -> bool:
        """Returns whether another dataset has the same file as cache.

        Args:
            dataset: A dataset of `cache`.
        """
        name = _bytes(dataset._filename)
        return bool(name) and dataset_files.is_seen(name, self._caches)


def _bytes(value: Any) -> bytes:
    return bytes(tf.constant(value).numpy())


def _is_same(first: Any, second: Any) -> bool:
    """Returns whether two sources have the same elements."""
    if first is second or type(first) is not type(second):
        return first is second
    names = ("_tensors", "_filenames", "_path", "_start", "_stop", "_step")
    a_inputs, b_inputs = (
        [t for n in names for t in tf.nest.flatten(vars(d).get(n, []))] for d in (first, second)
    )
    if len(a_inputs) != len(b_inputs) or not a_inputs:
        return False
    return all(_are_equal(a, b) for a, b in zip(a_inputs, b_inputs, strict=True))


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, tf.data.Dataset):
        return _is_same(first, second)
    if tf.is_tensor(first) and first.dtype == tf.variant:
        return first is second
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape:
        return False
    if first.dtype != second.dtype and first.dtype.kind in "fiu" and second.dtype.kind in "fiu":
        return bool(np.allclose(first, second, equal_nan=True))  # the same, in another type
    return first.dtype == second.dtype and bool((first == second).all())


def _overlap(first: Any, second: Any) -> bool:
    """Returns whether two sources share rows, such as a class that a script passes twice.

    Single whole numbers and repeated rows, such as labels, do not identify examples.
    """
    pairs = ((a, b) for a in _tables(first) for b in _tables(second))
    return any(_have_common_rows(a, b) for a, b in pairs)


def _tables(source: Any) -> list[Any]:
    return [t for t in tf.nest.flatten(vars(source).get("_tensors", [])) if _may_be_examples(t)]


def _may_be_examples(tensor: Any) -> bool:
    kind, rank = tensor.dtype, tensor.shape.rank
    if kind == tf.string:
        return bool(rank == 1)
    return bool(rank and (kind.is_floating or (kind.is_integer and rank > 1)))


def _have_common_rows(first: Any, second: Any) -> bool:
    if (first.dtype == tf.string) != (second.dtype == tf.string):
        return False
    if first.dtype != second.dtype:
        first, second = tf.cast(first, tf.float32), tf.cast(second, tf.float32)
    a_size, b_size = (int(t.shape[1:].num_elements()) for t in (first, second))
    # Longer rows are cut into pieces: one source may hold batches of the rows of the other.
    size = min(a_size, b_size)
    if size == 0 or a_size % size or b_size % size:
        return False
    shorter, longer = sorted((_fingerprints(t, size) for t in (first, second)), key=len)
    distinct = np.unique(shorter)
    if 2 * len(distinct) < len(shorter):
        return False
    return bool(_SHARE * np.isin(distinct, longer).sum() > len(distinct))


def _fingerprints(rows: Any, size: int) -> Any:
    data = rows if rows.dtype == tf.string else tf.reshape(rows, [-1, size])
    fingerprints = tf.raw_ops.Fingerprint(data=data, method="farmhash64")
    return tf.bitcast(fingerprints, tf.uint64).numpy()
