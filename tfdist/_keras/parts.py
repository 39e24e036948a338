"""Backing variables of a `keras.Variable` other than a `tf.Variable`: parts, rows, a tensor.

Keras reads a variable's `_value` by `__tf_tensor__`, writes it by its `assign` methods, and
finds an optimizer's state for it by `_unique_id`.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.errors import StrategyError

Tensor = Any


class Split:
    """A backing variable whose rows are on several servers.

    Args:
        parts: `tf.Variable`s, in the order of their rows.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        rows = [int(part.shape[0]) for part in parts]
        self.edges = [0, *itertools.accumulate(rows)]
        self.shape = tf.TensorShape([self.edges[-1], *parts[0].shape[1:]])
        self.dtype = parts[0].dtype
        self.device = parts[0].device
        self.handle = None
        self._unique_id = uuid.uuid4().hex
        # The last gradient that `join` has made, with its parts, so that `cut` need not slice.
        self._joined: tuple[Tensor, list[Tensor]] | None = None

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        return tf.cast(tf.concat(self.parts, 0), dtype or self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy().astype(dtype or self.dtype.as_numpy_dtype)

    def numpy(self) -> Any:
        """Reads all parts."""
        return tf.convert_to_tensor(self).numpy()

    def _serialize_to_tensors(self) -> dict[str, Tensor]:
        raise StrategyError(
            "A tf.train.Checkpoint must be saved after training where variables are on several "
            "servers. Received: a callback that saves one. Pass `checkpoint=` to fit, or save "
            "the model by a keras.callbacks.ModelCheckpoint."
        )

    def assign(self, value: Any) -> None:
        """Writes all parts.

        Args:
            value: A tensor of the whole shape.
        """
        for part, rows in zip(self.parts, self.cut(tf.convert_to_tensor(value)), strict=True):
            part.assign(rows)

    def __sub__(self, other: Any) -> Tensor:
        return tf.convert_to_tensor(self) - tf.convert_to_tensor(other)

    def assign_add(self, value: Any) -> None:
        """Adds to all parts.

        Args:
            value: As in `assign`.
        """
        for part, rows in zip(self.parts, self.cut(tf.convert_to_tensor(value)), strict=True):
            part.assign_add(rows)

    def lookup(self, ids: Tensor) -> Tensor:
        """Reads rows, each from its server.

        Args:
            ids: Row numbers of any shape.
        """
        # Each server gathers its own rows. `dynamic_stitch` undoes `dynamic_partition`, so the
        # rows return in the order of `ids`.
        flat = tf.reshape(ids, [-1])
        edges = tf.constant(self.edges[1:-1], flat.dtype)
        owners = tf.searchsorted(edges, flat, side="right")
        positions = tf.dynamic_partition(tf.range(tf.size(flat)), owners, len(self.parts))
        rows = [
            tf.gather(part, tf.gather(flat, at) - edge)
            for part, at, edge in zip(self.parts, positions, self.edges, strict=False)
        ]
        stitched = tf.dynamic_stitch(positions, rows)
        return tf.reshape(stitched, tf.concat([tf.shape(ids), self.shape[1:]], 0))

    def cut(self, whole: Tensor) -> list[Tensor]:
        """Cuts a tensor, or `tf.IndexedSlices`, into the rows of each part.

        Args:
            whole: A tensor of the whole shape.
        """
        if self._joined is not None and self._joined[0] is whole:
            return self._joined[1]
        return [self._rows(whole, *edges) for edges in itertools.pairwise(self.edges)]

    def _rows(self, whole: Tensor, begin: int, end: int) -> Tensor:
        if not isinstance(whole, tf.IndexedSlices):
            return whole[begin:end]
        inside = (whole.indices >= begin) & (whole.indices < end)
        return tf.IndexedSlices(
            tf.boolean_mask(whole.values, inside),
            tf.boolean_mask(whole.indices, inside) - begin,
            tf.constant([end - begin, *self.shape[1:]], tf.int64),
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Joins the gradients of the parts into one. Some may be None.

        Args:
            parts: The gradient of each part, dense or `tf.IndexedSlices`.
        """
        if all(part is None for part in parts):
            return None
        if any(part is not None and not isinstance(part, tf.IndexedSlices) for part in parts):
            whole = tf.concat(
                [
                    tf.zeros_like(variable) if part is None else tf.convert_to_tensor(part)
                    for part, variable in zip(parts, self.parts, strict=True)
                ],
                0,
            )
            self._joined = (whole, tf.split(whole, [int(p.shape[0]) for p in self.parts]))
            return whole
        # All parts were only looked up, so the whole gradient has rows too.
        slices = [
            (p, edge) for p, edge in zip(parts, self.edges, strict=False) if p is not None
        ]
        return tf.IndexedSlices(
            tf.concat([part.values for part, _ in slices], 0),
            tf.concat([tf.cast(part.indices, tf.int64) + edge for part, edge in slices], 0),
            tf.constant(self.shape.as_list(), tf.int64),
        )


class VariableRows:
    """Some rows of a variable. An optimizer updates them like a whole variable.

    Args:
        variable: The `tf.Variable`.
        ids: Distinct row numbers, shape [rows].
    """

    def __init__(self, variable: Any, ids: Tensor) -> None:
        self._variable = variable
        self._ids = ids
        self.dtype = variable.dtype
        self.shape = tf.TensorShape([None, *variable.shape[1:]])
        self._unique_id = variable._unique_id

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        return tf.cast(tf.gather(self._variable, self._ids), dtype or self.dtype)

    def assign(self, values: Tensor) -> None:
        """Writes the rows."""
        self._variable.scatter_update(tf.IndexedSlices(values, self._ids))

    def assign_add(self, values: Tensor) -> None:
        """Adds to the rows."""
        self._variable.scatter_add(tf.IndexedSlices(values, self._ids))

    def assign_sub(self, values: Tensor) -> None:
        """Subtracts from the rows."""
        self._variable.scatter_sub(tf.IndexedSlices(values, self._ids))


class FixedValue:
    """A tensor that backs a `keras.Variable` for a while. It cannot be assigned.

    Args:
        value: The tensor.
    """

    def __init__(self, value: Tensor) -> None:
        self._tensor = value
        self.dtype = value.dtype
        self.shape = value.shape

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        return tf.cast(self._tensor, dtype or self.dtype)


def parts_of(variable: Any) -> list[Any]:
    """Lists the `tf.Variable`s that back a `keras.Variable`.

    Args:
        variable: The `keras.Variable`.
    """
    value = variable._value
    return value.parts if isinstance(value, Split) else [value]
