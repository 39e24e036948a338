"""Checks that an example's gradient depends on no other example.

Clipping bounds what an example adds to a sum only if the other summands stay as they are
without it. So one half of some rows is given other company: none, or the other half changed,
enlarged and moved. The random numbers of each row are pinned to the row meanwhile. What the
half adds to the gradient must be the same, and the derivatives of its outputs by the inputs of
other rows must be 0. A layer may also begin to mix later, or in larger batches: see
`spot_checks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist._keras import RowKeys
from tfdist._keras import layers as keras_layers
from tfdist.data.leaves import spec as spec_of_rows
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism import clipping, rows
from tfdist.privacy.mechanism.contributions import (
    Added,
    Columns,
    added,
    drawing,
    is_same,
    mixes,
    pinned,
    tolerance_for,
)
from tfdist.privacy.mechanism.unfit_layers import keeps_state

Tensor = Any
ROWS = 16  # that are tried together
_FOR_SUMS = 3  # rows: these are computed without a graph
_LARGE = 1e3
_PINNED = (0x1234567, 0x89ABCDE)  # which numbers are drawn does not matter here
_DRAWS = 16  # with other random numbers: a layer may mix only where one of them says so


def check(model: Any, x: Any, y: Any, sample_weight: Any = None) -> None:
    """Compares the gradients of some examples, unclipped, with plain ones, and in two batches.

    A weight that is used outside its layer's `call` (tied by hand, say) would else be missed,
    and a layer that mixes examples would not be noticed. The model is left as it was.

    Args:
        model: As in `clipped_sum`.
        x: As in `clipped_sum`; some rows, which should differ.
        y: As in `clipped_sum`.
        sample_weight: As in `clipped_sum`.

    Raises:
        ArgumentError: They differ, or the model changes its state, adds losses, or draws
            random numbers that do not follow from `keras.random`.
    """
    tolerance = tolerance_for(model)
    state = model.non_trainable_variables
    before = [tf.identity(v.value) for v in state]
    few = rows.taken((x, y, sample_weight), np.arange(_FOR_SUMS) % rows.count(x))
    try:
        with _exact_products(), _keras.replicated():
            _check_sum(model, *few, tolerance)
            _check_state(state, before)
            _Comparison(model, (x, y, sample_weight), tolerance).make()
    finally:
        for variable, value in zip(state, before, strict=True):
            variable.assign(value)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Keeps GPUs from rounding the factors of products to 11 bits (TensorFloat-32)."""
    rounds = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(rounds)


def _check_sum(model: Any, x: Any, y: Any, sample_weight: Any, tolerance: float) -> None:
    with drawing(_keys(tf.range(1, rows.count(x) + 1, dtype=tf.int64))):
        parts, plain, _ = clipping.recorded(model, x, y, sample_weight, also_plain=True)
    with keras_layers.without_regularizers(model.trainable_variables):
        if model.losses:
            raise ArgumentError(
                "The loss must come from `compile` and the regularizers of weights alone. "
                "Received: a model with a layer that calls `add_loss` or has an "
                "`activity_regularizer`: what they add is of the whole batch. Leave them out."
            )
    examples = tf.shape(parts[0].squared_norms())[0]
    ones = {id(part.variable): tf.ones([examples]) for part in parts}
    received = clipping.weighted_sums(model, parts, ones, tf.constant(True))
    for variable, sums, expected in zip(
        model.trainable_variables, received, plain, strict=True
    ):
        difference = float(tf.norm(sums - tf.cast(expected, tf.float32)))
        if difference > tolerance * float(tf.norm(tf.cast(expected, tf.float32))) + 1e-6:
            raise ArgumentError(
                "All weights must be used by the layers that hold them, in their `call`, and "
                "no layer may mix examples. Received: a model in which the gradients by "
                f"{variable.path!r} of single examples do not add up to the batch's. Let a "
                "layer be called where its weight is used."
            )


def _check_state(state: Sequence[Any], before: Sequence[Tensor]) -> None:
    for variable, value in zip(state, before, strict=True):
        if keras_layers.is_seed(variable) or bool(tf.reduce_all(variable.value == value)):
            continue
        raise keeps_state(variable.path)


class _Comparison:
    """Compares what half of some rows add to the gradient in several batches."""

    def __init__(self, model: Any, columns: Columns, tolerance: float) -> None:
        self._model, self._tolerance = model, tolerance
        self._random = np.random.default_rng(0)
        count = max(4, min(ROWS, rows.count(columns[0])))
        self._columns = rows.taken(columns, np.arange(count) % rows.count(columns[0]))
        self._rows = count
        self._secret = _PINNED
        self._function = self._traced(self._columns)

    def make(self) -> None:
        """Compares.

        Raises:
            ArgumentError: They add different things, or draw what does not follow from seeds.
        """
        self._check_draws()
        kept = np.sort(self._random.permutation(self._rows)[: self._rows // 2])
        weights = self._weights(kept)
        whole = self._finite(weights)
        if whole is None:
            return  # none of these rows counts anything
        self._compare_alone(self._columns, kept, weights, whole)
        self._compare_other_draws(weights)
        others = np.setdiff1d(np.arange(self._rows), kept)
        for amount, factor in ((1.0, _LARGE), (1e-3, 1.0)):
            try:
                jittered = self._jittered(amount, 1.0)
                company = self._jittered(amount, factor)
                self._compare(jittered, company, others)
                self._check_derivatives(jittered, others)
            except ArgumentError:
                raise
            except (tf.errors.OpError, ValueError, TypeError):
                continue  # a model need not take what is not of its data
            return

    def _finite(self, weights: Any) -> Added | None:
        """Takes other rows in place of those whose gradients are not finite.

        Returns:
            What the rows add, or None if none is finite.
        """
        everyone = np.arange(self._rows)
        whole = self._added(self._columns, everyone, weights)
        finite = np.flatnonzero(np.isfinite(whole.squares.numpy()))
        if len(finite) == self._rows or not len(finite):
            return whole if len(finite) else None
        self._columns = rows.taken(self._columns, finite[everyone % len(finite)])
        return self._added(self._columns, everyone, weights)

    def _weights(self, kept: Any) -> Any:
        """Draws by what the gradients of kept rows are multiplied; those of others by 0."""
        weights = np.zeros(self._rows)
        weights[kept] = self._random.choice([-1.0, 1.0], len(kept))
        weights[kept] *= self._random.uniform(0.5, 1.5, len(kept))
        return weights

    def _compare_alone(self, columns: Columns, kept: Any, weights: Any, whole: Added) -> Any:
        """Compares kept rows among all with the same alone, in another order.

        Returns:
            The order.
        """
        order = kept[self._random.permutation(len(kept))]
        alone = self._added(rows.taken(columns, order), order, weights[order])
        self._check(alone, whole, weights, "without others")
        return order

    def _compare_other_draws(self, weights: Any) -> None:
        """Compares rows among all with the same alone, if random numbers matter to them."""
        if not keras_layers.seeds(self._model):
            return
        kept = np.flatnonzero(weights)
        for number in range(1, _DRAWS):
            self._secret = _PINNED[0] + number, _PINNED[1]
            whole = self._added(self._columns, np.arange(self._rows), weights)
            self._compare_alone(self._columns, kept, weights, whole)
        self._secret = _PINNED

    def _compare(self, columns: Columns, company: Columns, kept: Any) -> None:
        """Gives rows company in the order that they have, and then other, in another order."""
        weights = self._weights(kept)
        everyone = np.arange(self._rows)
        whole = self._added(columns, everyone, weights)
        if not np.isfinite(whole.squares.numpy()[kept]).all():
            raise ValueError("norms that are not finite")
        order = self._compare_alone(columns, kept, weights, whole)
        rest = np.setdiff1d(everyone, kept)[::-1]
        before, after = np.split(rest, [len(rest) // 2 + 1])
        moved = rows.joined(
            rows.taken(company, before), rows.taken(columns, order), rows.taken(company, after)
        )
        numbers = np.concatenate([before + self._rows, order, after + self._rows])
        moved_weights = np.concatenate([0 * before, weights[order], 0 * after])
        among = self._added(moved, numbers, moved_weights)
        self._check(among, whole, weights, "among others")

    def _check(self, other: Added, whole: Added, weights: Any, where: str) -> None:
        weights = tf.constant(weights, tf.float32)
        if not bool(is_same(other, whole, weights, self._tolerance)):
            raise mixes(f"what examples add to the gradient is another thing {where}")

    def _added(self, columns: Columns, numbers: Any, weights: Any) -> Added:
        leaves = [leaf for leaf in tf.nest.flatten(columns) if leaf is not None]
        numbers = tf.constant(numbers + 1, tf.int64)
        secret = tf.constant(self._secret, tf.int64)
        found: Added = self._function(leaves, numbers, secret, tf.constant(weights, tf.float32))
        return found

    def _traced(self, columns: Columns) -> Any:
        model = self._model
        leaves = [leaf for leaf in tf.nest.flatten(columns) if leaf is not None]

        def compute(
            leaves: list[Any], numbers: Tensor, secret: Tensor, weights: Tensor
        ) -> Added:
            given = iter(leaves)
            filled = tf.nest.map_structure(
                lambda leaf: None if leaf is None else next(given), columns
            )
            return added(model, filled, RowKeys(numbers, secret), weights)

        if model.run_eagerly:
            return compute
        signature = [
            [spec_of_rows(leaf) for leaf in leaves],
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([2], tf.int64),
            tf.TensorSpec([None], tf.float32),
        ]
        function = tf.function(compute, input_signature=signature, autograph=False)
        return function.get_concrete_function()

    def _check_draws(self) -> None:
        """Refuses random numbers of which it is not known what they follow from."""
        if self._model.run_eagerly:
            return
        drawn = _keras.random_ops(self._function.graph)
        if drawn:
            raise ArgumentError(
                "The random numbers of a private model must be drawn by `keras.random`: they "
                "are then a function of a secret and of each example. Received: a layer that "
                f"draws by TensorFlow's {drawn[0]}. Use keras.random.normal and the like, "
                "with a keras.random.SeedGenerator."
            )

    def _check_derivatives(self, columns: Columns, kept: Any) -> None:
        """Sees that outputs of the kept rows do not follow from inputs of others."""
        x = tf.nest.map_structure(lambda leaf: tf.convert_to_tensor(leaf), columns[0])
        inputs = [leaf for leaf in tf.nest.flatten(x) if leaf.dtype.is_floating]
        is_kept = np.isin(np.arange(self._rows), kept)
        keys = _keys(tf.range(1, self._rows + 1, dtype=tf.int64))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            with pinned(self._model, keys):
                outputs = self._model(x, training=True)
            outputs = [leaf for leaf in tf.nest.flatten(outputs) if leaf.dtype.is_floating]
        cotangents = [
            tf.constant(self._random.normal(size=leaf.shape), leaf.dtype)
            * tf.cast(tf.reshape(is_kept, [-1] + [1] * (leaf.shape.rank - 1)), leaf.dtype)
            for leaf in outputs
        ]
        found = tape.gradient(outputs, inputs, cotangents) if inputs and outputs else []
        for derivative in found:
            if derivative is None:
                continue
            sizes = np.abs(np.asarray(tf.cast(derivative, tf.float64)))
            sizes = sizes.reshape(self._rows, -1).max(1, initial=0.0)
            if sizes[~is_kept].max() > 1e-9 * sizes[is_kept].max():
                raise mixes("an example's outputs have derivatives by the inputs of others")

    def _jittered(self, amount: float, factor: float) -> Columns:
        """Changes rows: no two floats are alike, other values go to other rows."""
        order = self._random.permutation(self._rows)

        def change(leaf: Any) -> Any:
            if not isinstance(leaf, tf.Tensor):
                return leaf
            if not leaf.dtype.is_floating:
                return tf.gather(leaf, order) if factor != 1.0 else leaf
            values = np.asarray(tf.cast(leaf, tf.float64))
            scale = values.std() or np.abs(values).max() or 1.0
            noise = self._random.normal(size=values.shape) * scale * amount
            return tf.cast((values + noise) * factor, leaf.dtype)

        x, *others = self._columns
        return (tf.nest.map_structure(change, x), *others)


def _keys(numbers: Tensor) -> RowKeys:
    return RowKeys(numbers, tf.constant(_PINNED, tf.int64))
