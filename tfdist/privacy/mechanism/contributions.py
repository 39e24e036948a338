"""The contribution of rows of a batch to the gradient, to compare it between batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch, RowKeys
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism import clipping
from tfdist.privacy.mechanism.parts import weighted_sums

Tensor = Any
_ABSOLUTE = 1e-6  # rounding of gradients of almost 0, as of a saturated loss
Columns = tuple[Any, Any, Any]


class Added(NamedTuple):
    """The weighted contribution of some rows of a batch to the gradient.

    Attributes:
        sums: The weighted sum of the rows' gradients, for each variable.
        squares: The squared norm of each row's gradient, shape [rows].
        clipped: The same sum of clipped gradients. Those that are not finite are left out.
    """

    sums: list[Tensor]
    squares: Tensor
    clipped: list[Tensor]


def added(
    model: Any, columns: Columns, keys: RowKeys, weights: Tensor, l2_norm_clip: Any
) -> Added:
    """Computes the contribution of rows in training mode, and leaves the model as it is.

    Args:
        model: A compiled, built `keras.Model`.
        columns: `x`, `y` and `sample_weight` of some rows.
        keys: The keys of the rows' random numbers.
        weights: The factors of the rows' gradients, shape [rows]. A row with 0 adds nothing.
        l2_norm_clip: The clipping norm.
    """
    with pinned(model, keys):
        parts, _, _ = clipping.recorded(model, *columns)
    squares = tf.add_n([part.squared_norms() for part in parts])
    finite = tf.reduce_all(tf.math.is_finite(squares))
    norm = tf.cast(l2_norm_clip, tf.float32)
    share = tf.minimum(tf.math.divide_no_nan(norm, tf.sqrt(squares)), 1.0)
    share = tf.where(squares == 0, 1.0, tf.where(tf.math.is_finite(squares), share, 0.0))

    weightings = [
        {id(part.variable): factors for part in parts} for factors in (weights, weights * share)
    ]
    sums, clipped = weighted_sums(model, parts, weightings, finite)
    return Added(sums, squares, clipped)


def is_same(
    first: Added,
    second: Added,
    weights: Tensor,
    tolerance: float,
    l2_norm_clip: Any,
    rounding: Any = 0.0,
) -> Tensor:
    """Returns whether some rows contribute the same to two batches, also when they are clipped.

    A row with a large gradient would hide what others add if rows were only compared as they
    are. If they were only compared clipped, it would not be seen that they change each other's
    norms. Clipping does not enlarge differences: a row of norm g changes what it adds by at
    most `tolerance * min(g, l2_norm_clip)`, besides the absolute tolerance for gradients of
    almost 0. That tolerance is also bounded by `tolerance * l2_norm_clip`. Measured rounding
    may replace it, up to `tolerance * l2_norm_clip` for each row.

    Args:
        first: The contribution in one batch.
        second: The contribution in another batch.
        weights: The weights of all rows of the other batch.
        tolerance: The largest difference that rounding may cause, relative to norms.
        l2_norm_clip: The clipping norm.
        rounding: How far rounding alone moves the contribution, if that was measured.

    Returns:
        Scalar bool. Rows whose norms are not finite are not compared: they count as 0.
    """
    norm = tf.cast(l2_norm_clip, tf.float32)
    of_a_row = tolerance * norm
    least = tf.minimum(_ABSOLUTE, of_a_row)
    least = tf.maximum(least, tf.minimum(rounding, of_a_row * tf.norm(weights)))
    squares = second.squares
    scale = tf.sqrt(tf.reduce_sum(tf.where(weights == 0, 0.0, weights**2 * squares)))
    are_same = difference(first.sums, second.sums) <= tolerance * scale + least
    bounded = tf.minimum(squares, tf.square(norm))
    counts = (weights != 0) & tf.math.is_finite(squares)
    clipped = tf.sqrt(tf.reduce_sum(tf.where(counts, weights**2 * bounded, 0.0)))
    are_same_clipped = difference(first.clipped, second.clipped) <= tolerance * clipped + least
    return (~tf.math.is_finite(scale) | are_same) & are_same_clipped


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Returns the norm of the difference of two sums, a float32 scalar.

    Args:
        first: A sum for each variable.
        second: Another one.
    """
    squares = [
        tf.reduce_sum(tf.square(tf.cast(a, tf.float32) - tf.cast(b, tf.float32)))
        for a, b in zip(first, second, strict=True)
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
