"""What rows of a batch add to the gradient, to be compared with what they add elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch, RowKeys
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism import clipping

Tensor = Any
Columns = tuple[Any, Any, Any]
_HALF = ("bfloat16", "float16")


class Added(NamedTuple):
    """What some rows of a batch add to the gradient, each times a weight of its own.

    Attributes:
        sums: By variable.
        squares: Of each row's norm, shape [rows].
    """

    sums: list[Tensor]
    squares: Tensor


def added(model: Any, columns: Columns, keys: RowKeys, weights: Tensor) -> Added:
    """Computes what rows add to the gradient in training, and leaves the model as it is.

    Args:
        model: A compiled, built `keras.Model`.
        columns: `x`, `y` and `sample_weight` of some rows.
        keys: Of the rows: what their random numbers follow from.
        weights: By which gradients are multiplied, shape [rows]; with 0 a row adds nothing.
    """
    with pinned(model, keys):
        parts, _, _ = clipping.recorded(model, *columns)
    squares = tf.add_n([part.squared_norms() for part in parts])
    finite = tf.reduce_all(tf.math.is_finite(squares))
    factors = {id(part.variable): weights for part in parts}
    return Added(clipping.weighted_sums(model, parts, factors, finite), squares)


def is_same(one: Added, other: Added, weights: Tensor, tolerance: float) -> Tensor:
    """Tells whether two batches got the same from the rows that they have in common.

    Args:
        one: What the rows added in one batch, the last.
        other: What they added in the other.
        weights: Of all rows of that other batch.
        tolerance: What rounding may change, relative to norms.

    Returns:
        Scalar bool; also true where norms are not finite, which tells nothing.
    """
    scale = tf.sqrt(tf.reduce_sum(tf.where(weights == 0, 0.0, weights**2 * other.squares)))
    differences = [
        tf.reduce_sum(tf.square(tf.cast(a, tf.float32) - tf.cast(b, tf.float32)))
        for a, b in zip(one.sums, other.sums, strict=True)
    ]
    distance = tf.sqrt(tf.add_n(differences))
    known = tf.math.is_finite(scale)
    return ~known | (distance <= tolerance * scale + 1e-6)


def tolerance_for(model: Any) -> float:
    """Says what rounding may change of a gradient, relative to its norm.

    Args:
        model: A `keras.Model`.
    """
    half = any(layer.compute_dtype in _HALF for layer in _keras.layers_of(model))
    return 0.05 if half else 1e-3


@contextlib.contextmanager
def pinned(model: Any, keys: RowKeys) -> Iterator[None]:
    """Has random numbers follow from keys, and leaves seeds and other state as they are.

    Works within `_keras.replicated()`.

    Args:
        model: A built `keras.Model`.
        keys: Of the rows that it is called with.
    """
    with drawing(keys) as batch:
        yield
    for variable, value in list(batch.touched.values()):
        variable.assign(value)


@contextlib.contextmanager
def drawing(keys: RowKeys) -> Iterator[ReplicaBatch]:
    """Has random numbers follow from keys; seeds move on, and other state may change.

    Args:
        keys: As in `pinned`.

    Yields:
        What notes the changes.
    """
    rows = tf.size(keys.rows, tf.int64)
    batch = ReplicaBatch(rows, rows, tf.zeros([], tf.int64), list, tf.identity, keys=keys)
    with _keras.on_replica(batch):
        yield batch


def mixes(what: str) -> ArgumentError:
    """Makes the error that says that examples are mixed.

    Args:
        what: Was seen, a part of a sentence.
    """
    return ArgumentError(
        "No layer and no loss may mix the examples of a batch. Received: a model in which "
        f"{what}. Leave out the layer that does so; random numbers must be drawn by "
        "`keras.random`, with the batch as their first axis."
    )
