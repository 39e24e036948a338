"""Compares what half of some rows add to the gradient in several batches.

The half is computed alone, and together with the other half, which is changed, enlarged and
moved. The random numbers of each row stay the same. See `independence`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist._keras import RowKeys
from tfdist._keras import layers as keras_layers
from tfdist.data.leaves import spec as spec_of_rows
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism import rows
from tfdist.privacy.mechanism.contributions import (
    Added,
    Columns,
    added,
    difference,
    is_same,
    mixes,
    pinned,
)

Tensor = Any
ROWS = 16  # rows of a batch
_LARGE = 1e3
_SECRET = (0x1234567, 0x89ABCDE)  # any constants: the random numbers need not be secret here
_ROUNDINGS = 16  # times that weights are moved by two steps of float32
_ROUNDING_MARGIN = 2.0
_DRAWS = 16  # batches with other random numbers: some numbers may let a layer mix examples


class Comparison:
    """Compares the contribution of half of some rows to the gradient in several batches.

    Args:
        model: A compiled, built `keras.Model`.
        columns: `x`, `y` and `sample_weight` of some rows.
        tolerance: The largest difference that rounding may cause, relative to norms.
        l2_norm_clip: The clipping norm.
    """

    def __init__(
        self, model: Any, columns: Columns, tolerance: float, l2_norm_clip: float
    ) -> None:
        self._model, self._tolerance, self._norm = model, tolerance, l2_norm_clip
        self._random = np.random.default_rng(0)
        count = max(4, min(ROWS, rows.count(columns[0])))
        self._columns = rows.selected(columns, np.arange(count) % rows.count(columns[0]))
        self._rows = count
        self._secret = _SECRET
        self._function = self._traced(self._columns)

    def make(self) -> None:
        """Makes all comparisons.

        Raises:
            ArgumentError: The rows add different gradients, or draw random numbers that do not
                follow from seeds.
        """
        self._check_draws()
        half = np.sort(self._random.permutation(self._rows)[: self._rows // 2])
        weights = self._weights(half)
        among_all = self._finite(weights)
        if among_all is None:
            return  # examples with gradients that are not finite count as 0
        self._compare_alone(self._columns, half, weights, among_all)
        # Of the largest gradient, which is rounded least.
        self._compare_single_row(half[np.argmax(among_all.squares.numpy()[half])])
        self._compare_other_draws(weights)
        other_half = np.setdiff1d(np.arange(self._rows), half)
        for amount, factor in ((1.0, _LARGE), (1e-3, 1.0)):
            try:
                jittered = self._jittered(amount, 1.0)
                company = self._jittered(amount, factor)
                self._compare(jittered, company, other_half)
                self._check_derivatives(jittered, other_half)
            except ArgumentError:
                raise
            except (tf.errors.OpError, ValueError, TypeError):
                # A model need not accept inputs far from its data. Smaller changes come next.
                continue
            return

    def _finite(self, weights: Any) -> Added | None:
        """Replaces rows whose gradients are not finite by other rows.

        Returns:
            The contribution of the rows, or None if no row is finite.
        """
        numbers = np.arange(self._rows)
        among_all = self._added(self._columns, numbers, weights)
        finite = np.flatnonzero(np.isfinite(among_all.squares.numpy()))
        if len(finite) == self._rows or not len(finite):
            return among_all if len(finite) else None
        self._columns = rows.selected(self._columns, finite[numbers % len(finite)])
        return self._added(self._columns, numbers, weights)

    def _weights(self, half: Any) -> Any:
        """Draws the factors of the gradients of half of the rows. The others have 0.

        They are positive, so that a small change that all rows have in common adds up, and
        differ, so that opposite changes do not cancel.
        """
        weights = np.zeros(self._rows)
        weights[half] = self._random.uniform(0.2, 1.8, len(half))
        return weights

    def _compare_alone(
        self, columns: Columns, half: Any, weights: Any, among_all: Added
    ) -> Any:
        """Compares rows in a batch of all rows with the same rows alone, in another order.

        Returns:
            The order.
        """
        order = half[self._random.permutation(len(half))]
        alone = self._added(rows.selected(columns, order), order, weights[order])
        self._check(alone, among_all, columns, weights, "without others")
        return order

    def _compare_single_row(self, row: Any) -> None:
        """Compares one row in a batch with that row alone, if there may be random numbers.

        The size of every axis is a multiple of one row. So random numbers along an axis of
        unknown size that is not the batch show here, whatever the size is.
        """
        if not keras_layers.seeds(self._model) and not _keras.has_global_seed():
            return
        weights = np.eye(self._rows)[row]
        among_all = self._added(self._columns, np.arange(self._rows), weights)
        self._compare_alone(self._columns, np.array([row]), weights, among_all)

    def _compare_other_draws(self, weights: Any) -> None:
        """Compares rows in a batch with the same rows alone, for several random numbers."""
        if not keras_layers.seeds(self._model):
            return
        half = np.flatnonzero(weights)
        for number in range(1, _DRAWS):
            self._secret = _SECRET[0] + number, _SECRET[1]
            among_all = self._added(self._columns, np.arange(self._rows), weights)
            self._compare_alone(self._columns, half, weights, among_all)
        self._secret = _SECRET

    def _compare(self, columns: Columns, company: Columns, half: Any) -> None:
        """Compares rows among all, alone, and among changed rows at other places."""
        weights = self._weights(half)
        numbers = np.arange(self._rows)
        among_all = self._added(columns, numbers, weights)
        # The caller then tries smaller changes of the inputs.
        if not np.isfinite(among_all.squares.numpy()[half]).all():
            raise ValueError("norms that are not finite")
        order = self._compare_alone(columns, half, weights, among_all)
        other_half = np.setdiff1d(numbers, half)[::-1]
        first, last = np.split(other_half, [len(other_half) // 2 + 1])
        moved = rows.joined(
            rows.selected(company, first),
            rows.selected(columns, order),
            rows.selected(company, last),
        )
        # Changed rows get new numbers, and so other random numbers. The half keeps its own.
        moved_numbers = np.concatenate([first + self._rows, order, last + self._rows])
        moved_weights = np.concatenate([0 * first, weights[order], 0 * last])
        among_others = self._added(moved, moved_numbers, moved_weights)
        self._check(among_others, among_all, columns, weights, "among others")

    def _check(
        self, received: Added, among_all: Added, columns: Columns, weights: Any, where: str
    ) -> None:
        factors, limits = tf.constant(weights, tf.float32), (self._tolerance, self._norm)
        if bool(is_same(received, among_all, factors, *limits)):
            return
        # Gradients of saturated functions, such as 1 - tanh(x)^2, are differences of almost
        # equal numbers. Processors round them in their own ways.
        rounding = self._rounding(among_all, columns, weights)
        if not bool(is_same(received, among_all, factors, *limits, rounding)):
            raise mixes(f"what examples add to the gradient is another thing {where}")

    def _rounding(self, among_all: Added, columns: Columns, weights: Any) -> Tensor:
        """Measures how far rounding moves a contribution, by weights that are rounded anew."""
        variables = [v for v in self._model.trainable_variables if v.dtype == "float32"]
        values = [tf.identity(v.value) for v in variables]
        most = tf.zeros([])
        try:
            for _ in range(_ROUNDINGS):
                for variable, value in zip(variables, values, strict=True):
                    signs = self._random.choice([-1.0, 1.0], value.shape)
                    variable.assign(value * tf.constant(1 + 2.0**-22 * signs, tf.float32))
                moved = self._added(columns, np.arange(self._rows), weights)
                most = tf.maximum(most, difference(moved.sums, among_all.sums))
        finally:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        return _ROUNDING_MARGIN * most

    def _added(self, columns: Columns, numbers: Any, weights: Any) -> Added:
        leaves = [leaf for leaf in tf.nest.flatten(columns) if leaf is not None]
        numbers = tf.constant(numbers + 1, tf.int64)
        secret = tf.constant(self._secret, tf.int64)
        contribution: Added = self._function(
            leaves, numbers, secret, tf.constant(weights, tf.float32)
        )
        return contribution

    def _traced(self, columns: Columns) -> Any:
        model = self._model
        leaves = [leaf for leaf in tf.nest.flatten(columns) if leaf is not None]

        def compute(
            leaves: list[Any], numbers: Tensor, secret: Tensor, weights: Tensor
        ) -> Added:
            remaining = iter(leaves)
            filled = tf.nest.map_structure(
                lambda leaf: None if leaf is None else next(remaining), columns
            )
            return added(model, filled, RowKeys(numbers, secret), weights, self._norm)

        signature = [
            [spec_of_rows(leaf) for leaf in leaves],
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([2], tf.int64),
            tf.TensorSpec([None], tf.float32),
        ]
        function = tf.function(compute, input_signature=signature, autograph=False)
        return function.get_concrete_function()

    def _check_draws(self) -> None:
        """Refuses random operations of TensorFlow, which do not follow from keys of rows."""
        operations = _keras.random_ops(self._function.graph)
        if operations:
            raise ArgumentError(
                "The random numbers of a private model must be drawn by `keras.random`: they "
                "then follow from a secret and from each example. Received: a layer that draws "
                f"by TensorFlow's {operations[0]}. Use a function of keras.random with a "
                "keras.random.SeedGenerator."
            )

    def _check_derivatives(self, columns: Columns, half: Any) -> None:
        """Checks that outputs of half of the rows do not depend on inputs of other rows."""
        x = tf.nest.map_structure(lambda leaf: tf.convert_to_tensor(leaf), columns[0])
        inputs = [leaf for leaf in tf.nest.flatten(x) if leaf.dtype.is_floating]
        in_half = np.isin(np.arange(self._rows), half)
        keys = public_keys(tf.range(1, self._rows + 1, dtype=tf.int64))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            with pinned(self._model, keys):
                outputs = self._model(x, training=True)
            outputs = [leaf for leaf in tf.nest.flatten(outputs) if leaf.dtype.is_floating]
        cotangents = [
            tf.constant(self._random.normal(size=leaf.shape), leaf.dtype)
            * tf.cast(tf.reshape(in_half, [-1] + [1] * (leaf.shape.rank - 1)), leaf.dtype)
            for leaf in outputs
        ]
        derivatives = tape.gradient(outputs, inputs, cotangents) if inputs and outputs else []
        for derivative in derivatives:
            if derivative is None:
                continue
            sizes = np.abs(np.asarray(tf.cast(derivative, tf.float64)))
            sizes = sizes.reshape(self._rows, -1).max(1, initial=0.0)
            if sizes[~in_half].max() > 1e-9 * sizes[in_half].max():
                raise mixes("an example's outputs have derivatives by the inputs of others")

    def _jittered(self, amount: float, factor: float) -> Columns:
        """Adds noise to floats. If they are also enlarged, other values are permuted."""
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


def public_keys(numbers: Tensor) -> RowKeys:
    """Returns keys of random numbers that anybody may know.

    Args:
        numbers: The numbers of rows, int64.
    """
    return RowKeys(numbers, tf.constant(_SECRET, tf.int64))
