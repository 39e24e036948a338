"""Makes examples that may contribute too much: scaled ones, and ones with cancelling parts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tfdist import _keras
from tfdist.privacy.checking.columns import Columns, joined, mapped, rows_of, selected

_SCALES = (1e-2, 30.0, 1e3, 1e30, math.nan)
HUGE, NOT_A_NUMBER = 6, 12  # places of these examples in the result of `families`
_OFFSETS = (1.0, 10.0, 100.0)
_ASCENT_STEPS = 60
_ASCENT_RATE = 0.05


def families(model: Any, examples: Columns, rng: np.random.Generator) -> Columns:
    """Makes examples from others, each by one rule.

    The rules make cases in which norms that are computed from products may be wrong: huge, tiny
    and NaN inputs and targets, sequences with equal or opposite positions, equal positions far
    from 0, a repeated word, and equal inputs of a model.

    Args:
        model: The model of the inputs.
        examples: The examples.
        rng: The random generator of the rules.
    """
    x, y, weight = examples
    inputs_scale = not _has_embedding(model)
    variants: list[Columns] = []
    for scale in _SCALES:
        grown = mapped(partial(_scaled, scale=scale, may_be_whole=inputs_scale), x)
        targets = mapped(partial(_scaled, scale=scale), y)
        variants += [(grown, y, weight), (grown, targets, weight), (x, targets, weight)]
    for offset in _OFFSETS:
        for sign in (1.0, -1.0):
            rule = partial(_alike, offset=offset, sign=sign, may_scale=inputs_scale, rng=rng)
            alike = _same_inputs(mapped(rule, x))
            for factor in (1.0, 100.0):
                targets = mapped(partial(_scaled, scale=factor * offset), y)
                variants.append((alike, targets, weight))
    return joined(variants)


def mutated(model: Any, examples: Columns, rng: np.random.Generator) -> Columns:
    """Changes examples at random.

    Args:
        model: The model of the inputs.
        examples: The examples.
        rng: The random generator of the changes.
    """
    inputs_scale = not _has_embedding(model)
    x, y, weight = examples

    def change(leaf: Any, may_scale: bool) -> Any:
        count = len(leaf)
        shape = (count, *[1] * (leaf.ndim - 1))
        if _is_scalable(leaf, may_scale):
            grown = leaf * np.exp(rng.normal(size=shape)).astype(leaf.dtype)
            size = np.abs(leaf).mean() * 0.1 * rng.choice([0.0, 0.01, 1.0], size=shape)
            return (grown + rng.normal(size=leaf.shape) * size).astype(leaf.dtype)
        other_rows = leaf[rng.integers(0, count, count)]
        return np.where(rng.random(leaf.shape) < 0.3, other_rows, leaf)

    changed_y = mapped(lambda leaf: change(leaf, True), y)
    return mapped(lambda leaf: change(leaf, inputs_scale), x), changed_y, weight


def cancelled(model: Any, examples: Columns) -> Columns | None:
    """Finds inputs whose gradient is small compared with its parts, by gradient descent.

    An example's gradient is a sum over positions. If the parts of the sum cancel, a norm that
    is computed from products is the least exact. So the ratio of the gradient's norm to the
    size of the input is minimized, and the result is scaled.

    Args:
        model: A compiled, built `keras.Model`.
        examples: The examples to begin with.

    Returns:
        The examples, or None if no input can be changed continuously.
    """
    x, y, _ = examples
    leaves = tf.nest.flatten(x)
    moved = [
        n for n, leaf in enumerate(leaves) if _is_scalable(leaf, not _has_embedding(model))
    ]
    if not moved or y is None:
        return None
    variables = [v.value for v in model.trainable_variables]

    def ratio(values: Any, targets: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for variable in variables:
                tape.watch(variable)
            outputs = model(tf.nest.pack_sequence_as(x, values), training=False)
            loss = model.compute_loss(None, targets, outputs, None, training=False)
        gradients = [g for g in tape.gradient(loss, variables) if g is not None]
        squares = [tf.reduce_sum(tf.square(tf.convert_to_tensor(g))) for g in gradients]
        size = tf.add_n([tf.reduce_sum(tf.square(values[n])) for n in moved])
        return tf.math.log(tf.add_n(squares) + 1e-20) - tf.math.log(size + 1e-20)

    @tf.function(autograph=False, reduce_retracing=True)  # type: ignore[untyped-decorator]
    def descend(values: Any, targets: Any) -> Any:
        def step(_: Any, now: Any) -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                for n in moved:
                    tape.watch(now[n])
                value = ratio(now, targets)
            slopes = tape.gradient(value, [now[n] for n in moved])
            later = list(now)
            for n, slope in zip(moved, slopes, strict=True):
                if slope is not None:
                    size = tf.norm(now[n]) * _ASCENT_RATE
                    later[n] = now[n] - slope * tf.math.divide_no_nan(size, tf.norm(slope))
            return _ + 1, later

        return tf.while_loop(lambda i, _: i < _ASCENT_STEPS, step, (tf.constant(0), values))[1]

    variants: list[Columns] = []
    for row in range(rows_of(examples)):
        one_x, one_y, one_weight = selected(examples, [row])
        values = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(one_x)]
        later = [leaf.numpy() for leaf in descend(values, one_y)]
        for scale in (1.0, 10.0, 1000.0):
            grown = [
                (leaf * scale).astype(leaf.dtype) if n in moved else leaf
                for n, leaf in enumerate(later)
            ]
            targets = mapped(partial(_scaled, scale=scale), one_y)
            variants.append((tf.nest.pack_sequence_as(x, grown), targets, one_weight))
    return joined(variants)


def _is_scalable(leaf: NDArray[Any], may_be_whole: bool = False) -> bool:
    """Returns whether an array has arbitrary numbers, not counts or names."""
    if not np.issubdtype(leaf.dtype, np.floating):
        return False
    return may_be_whole or not bool((leaf == np.round(leaf)).all())


def _scaled(leaf: NDArray[Any], scale: float, may_be_whole: bool = False) -> NDArray[Any]:
    scalable = _is_scalable(leaf, may_be_whole)
    grown: NDArray[Any] = (leaf * scale).astype(leaf.dtype) if scalable else leaf
    return grown


def _alike(
    leaf: NDArray[Any], offset: float, sign: float, may_scale: bool, rng: Any
) -> NDArray[Any]:
    """Makes all positions of an example nearly equal, or alternately opposite."""
    if leaf.ndim < 2:
        return leaf
    if not _is_scalable(leaf, may_scale):
        same = np.repeat(leaf[:, :1], leaf.shape[1], 1)
        if sign < 0 and leaf.shape[1] > 1:
            same[:, 1::2] = leaf[:, 1:2]
        return same
    near: NDArray[Any] = (rng.normal(size=leaf.shape) * 0.01 + offset).astype(leaf.dtype)
    if leaf.ndim > 2:
        near[:, 1::2] *= sign
    return near


def _same_inputs(x: Any) -> Any:
    """Sets all inputs of words to the values of the first one, if shapes allow."""
    leaves = tf.nest.flatten(x)
    first = leaves[0]
    same = [
        first.copy()
        if leaf.shape == first.shape and leaf.dtype == first.dtype and leaf.dtype.kind != "f"
        else leaf
        for leaf in leaves
    ]
    return tf.nest.pack_sequence_as(x, same)


def _has_embedding(model: Any) -> bool:
    """Returns whether an input may have word numbers, which must stay below a limit."""
    return any(isinstance(part, keras.layers.Embedding) for part in _keras.layers_of(model))
