"""The contribution of rows of a batch to the gradient, to compare it between batches."""

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
_ABSOLUTE = 1e-6  # rounding of gradients of almost 0, as of a saturated loss
Columns = tuple[Any, Any, Any]


class Added(NamedTuple):
    """The weighted contribution of some rows of a batch to the gradient.

    Attributes:
        sums: The weighted sum of the rows' gradients, for each variable.
        squares: The squared norm of each row's gradient, shape [rows].
    """

    sums: list[Tensor]
    squares: Tensor


def added(model: Any, columns: Columns, keys: RowKeys, weights: Tensor) -> Added:
    """Computes the contribution of rows in training mode, and leaves the model as it is.

    Args:
        model: A compiled, built `keras.Model`.
        columns: `x`, `y` and `sample_weight` of some rows.
        keys: The keys of the rows' random numbers.
        weights: The factors of the rows' gradients, shape [rows]. A row with 0 adds nothing.
    """
    with pinned(model, keys):
        parts, _, _ = clipping.recorded(model, *columns)
    squares = tf.add_n([part.squared_norms() for part in parts])
    finite = tf.reduce_all(tf.math.is_finite(squares))
    factors = {id(part.variable): weights for part in parts}
    return Added(clipping.weighted_sums(model, parts, factors, finite), squares)


def is_same(
    first: Added,
    second: Added,
    weights: Tensor,
    tolerance: float,
    l2_norm_clip: Any,
    rounding: Any = 0.0,
) -> Tensor:
    """Returns whether some rows contribute the same to two batches.

    Clipping does not enlarge differences: a row of norm g changes what it adds by at most
    `tolerance * min(g, l2_norm_clip)`, besides the absolute tolerance for gradients of almost
    0. That tolerance is also bounded by `tolerance * l2_norm_clip`. Measured rounding may
    replace it, up to `tolerance * l2_norm_clip` for each row.

    Args:
        first: The contribution in one batch.
        second: The contribution in another batch.
        weights: The weights of all rows of the other batch.
        tolerance: The largest difference that rounding may cause, relative to norms.
        l2_norm_clip: The clipping norm.
        rounding: How far rounding alone moves the contribution, if that was measured.

    Returns:
        Scalar bool. It is true if norms are not finite, since nothing can be compared then.
    """
    scale = tf.sqrt(tf.reduce_sum(tf.where(weights == 0, 0.0, weights**2 * second.squares)))
    distance = difference(first, second)
    is_finite = tf.math.is_finite(scale)
    of_a_row = tolerance * tf.cast(l2_norm_clip, tf.float32)
    least = tf.minimum(_ABSOLUTE, of_a_row)
    least = tf.maximum(least, tf.minimum(rounding, of_a_row * tf.norm(weights)))
    return ~is_finite | (distance <= tolerance * scale + least)


def difference(first: Added, second: Added) -> Tensor:
    """Returns the norm of the difference of two contributions, a float32 scalar.

    Args:
        first: A contribution.
        second: Another one.
    """
    squares = [
        tf.reduce_sum(tf.square(tf.cast(a, tf.float32) - tf.cast(b, tf.float32)))
        for a, b in zip(first.sums, second.sums, strict=True)
    ]
    return tf.sqrt(tf.add_n(squares))


def tolerance_for(model: Any) -> float:
    """Returns the largest relative difference that rounding may cause in a gradient.

    Args:
        model: A `keras.Model`, in the context `keras_layers.in_float32`.
    """
    half = ("bfloat16", "float16")
    in_half = _keras.computes_in(model, *half) or any(v.dtype in half for v in model.variables)
    return 5e-3 if in_half else 1e-4


@contextlib.contextmanager
def pinned(model: Any, keys: RowKeys) -> Iterator[None]:
    """Derives random numbers from keys, and restores seeds and other state afterwards.

    It must be used within `_keras.replicated()`.

    Args:
        model: A built `keras.Model`.
        keys: The keys of the rows with which the model is called.
    """
    with drawing(keys) as batch:
        yield
    # Seeds get their values back as well: a comparison must not change the random numbers of
    # the training.
    with _keras.seeding():
        for variable, value in list(batch.touched.values()):
            variable.assign(value)


@contextlib.contextmanager
def drawing(keys: RowKeys) -> Iterator[ReplicaBatch]:
    """Derives random numbers from keys. Seeds advance, and other state may change.

    Args:
        keys: As in `pinned`.

    Yields:
        The description of the batch, which records the changes.
    """
    rows = tf.size(keys.rows, tf.int64)
    batch = ReplicaBatch(rows, rows, tf.zeros([], tf.int64), list, tf.identity, keys=keys)
    with _keras.on_replica(batch):
        yield batch


def mixes(observation: str) -> ArgumentError:
    """Makes the error about a model that mixes examples.

    Args:
        observation: A clause that describes the observation.
    """
    return ArgumentError(
        "No layer and no loss may mix the examples of a batch. Received: a model in which "
        f"{observation}. Leave out the layer that does so. Draw random numbers with "
        "`keras.random`, with the batch as their first axis."
    )
