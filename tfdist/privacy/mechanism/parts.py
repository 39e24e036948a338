"""Per-example gradients of one variable, in forms that are cheap to sum.

Each form has a closed form of the squared norm of every example's gradient and of the weighted
sum over examples (Goodfellow, "Efficient per-example gradient computations", 2015; Li et al.,
"Large language models can be strong differentially private learners", ICLR 2022; Bu et al.,
"Differentially private optimization on large model at small cost", ICML 2023).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfdist.privacy.mechanism.clipping_groups import Alone, ClippingGroups, Groups
from tfdist.privacy.mechanism.gram_matrices import (
    squared_norms_by_row,
    squared_norms_of_products,
)
from tfdist.privacy.mechanism.rounding import UNDERFLOW, factor_unit, gamma, sums_of_squares
from tfdist.privacy.mechanism.row_sums import RowSum, summed

Tensor = Any
_ALONE = Alone()


class GradientPart(abc.ABC):
    """The gradients of all examples by one variable.

    Attributes:
        variable: The `keras.Variable`.
    """

    variable: Any

    @abc.abstractmethod
    def squared_norms(self, grouping: ClippingGroups = _ALONE) -> Tensor:
        """Returns the squared norm of the sum of each unit's gradients, shape [units].

        The norm bounds what `weighted_sum` adds for a weight of 1, with its rounding errors.
        Only underflow may make it too small, by at most 1e-14.

        Args:
            grouping: The rows of each unit.
        """

    @abc.abstractmethod
    def weighted_sum(self, weights: Tensor, grouping: ClippingGroups = _ALONE) -> RowSum:
        """Returns the sum of the gradients, each times its weight, to be computed.

        Args:
            weights: Shape [units]. A unit with weight 0 adds nothing, even if it is not finite.
            grouping: As in `squared_norms`, which must be called before.
        """

    @abc.abstractmethod
    def each(self) -> Tensor:
        """Returns the gradients one by one, shape [examples, *the variable's]."""

    @abc.abstractmethod
    def folded(self, count: int) -> GradientPart:
        """Returns the gradients of examples that have several neighbouring rows here.

        Args:
            count: The number of rows of an example.
        """


class Written(GradientPart):
    """Gradients written out one by one.

    Args:
        variable: The `keras.Variable`.
        gradients: Shape [examples, *the variable's].
    """

    def __init__(self, variable: Any, gradients: Tensor) -> None:
        self.variable = variable
        self._gradients = tf.cast(gradients, tf.float32)
        self._unit_sums: Tensor = None  # set by `squared_norms`

    def squared_norms(self, grouping: ClippingGroups = _ALONE) -> Tensor:
        """Squares and sums; see `GradientPart`."""
        self._unit_sums = grouping.sums(self._gradients)
        return _of_written(self._unit_sums)

    def weighted_sum(self, weights: Tensor, grouping: ClippingGroups = _ALONE) -> RowSum:
        """Contracts with the weights; see `GradientPart`."""
        # The same tensor as in `squared_norms`: if a unit's gradients cancel, another order of
        # additions may give a sum that is larger than the measured norm.
        units = self._unit_sums
        if units is None:
            units = grouping.sums(self._gradients)
        return RowSum(_contracted, weights, (units,), tf.identity)

    def each(self) -> Tensor:
        """Returns the gradients; see `GradientPart`."""
        return self._gradients

    def folded(self, count: int) -> GradientPart:
        """Sums an example's rows; see `GradientPart`."""
        split = tf.reshape(self._gradients, [-1, count, *self._gradients.shape[1:]])
        return Written(self.variable, tf.reduce_sum(split, 1))


class Product(GradientPart):
    """Gradients that are, for each example, the product of two matrices.

    Args:
        variable: The `keras.Variable`.
        inputs: Shape [examples, positions, p].
        outputs: Gradients by the outputs, shape [examples, positions, q].
        axes: How a product of shape [p, q] becomes the variable: the sizes of the axes in p
            followed by those in q, and the transposition to the variable's order of axes. None
            if the variable has the product's order of axes.
    """

    def __init__(
        self,
        variable: Any,
        inputs: Tensor,
        outputs: Tensor,
        axes: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        self.variable = variable
        self._inputs = tf.cast(inputs, tf.float32)
        self._outputs = tf.cast(outputs, tf.float32)
        self._axes = axes
        self._products: Tensor = None  # the products, if `squared_norms` has computed them
        self._cancels: Tensor = None  # whether positions cancel, if it used Gram matrices

    def squared_norms(self, grouping: ClippingGroups = _ALONE) -> Tensor:
        """Uses Gram matrices if they are smaller than the products; see `GradientPart`."""
        positions = self._inputs.shape[1]
        sizes = self._inputs.shape[2], self._outputs.shape[2]
        if positions is not None:
            positions *= grouping.max_rows
        if positions == 1:
            # The norm of an outer product is the product of the norms of its factors.
            squares = [
                sums_of_squares(f) + f.shape[2] * UNDERFLOW
                for f in (self._inputs, self._outputs)
            ]
            return squares[0] * squares[1] * _read_again()
        factors = grouping.joined(self._inputs), grouping.joined(self._outputs)
        if _gram_is_smaller(positions, *sizes):
            squares, self._cancels = squared_norms_of_products(*factors)
            return squares
        self._products = tf.matmul(*factors, transpose_a=True)
        return _of_written(self._products)

    def weighted_sum(self, weights: Tensor, grouping: ClippingGroups = _ALONE) -> RowSum:
        """Sums over examples and positions in one product; see `GradientPart`.

        Large positions of one example may cancel each other. In float32 their partial sums
        would round away what other examples add.
        """

        def arranged(product: Tensor) -> Tensor:
            return tf.reshape(self._arranged(product), self.variable.shape)

        if self._products is not None:
            return RowSum(_contracted, weights, (self._products,), arranged)
        factors = self._inputs, self._outputs
        by_row = grouping.by_row(weights)
        return RowSum(_weighted_product, by_row, factors, arranged, self._cancels)

    def each(self) -> Tensor:
        """Multiplies example by example; see `GradientPart`."""
        return self._arranged(tf.matmul(self._inputs, self._outputs, transpose_a=True))

    def folded(self, count: int) -> GradientPart:
        """Turns an example's rows into positions; see `GradientPart`."""
        inputs, outputs = _unfolded(self._inputs, count), _unfolded(self._outputs, count)
        return Product(self.variable, inputs, outputs, self._axes)

    def _arranged(self, products: Tensor) -> Tensor:
        shape, order = self._axes or (self.variable.shape, range(len(self.variable.shape)))
        parts = tf.reshape(products, [-1, *shape])
        if list(order) != list(range(len(shape))):
            parts = tf.transpose(parts, [0, *(axis + 1 for axis in order)])
        return tf.reshape(parts, [-1, *self.variable.shape])


class Lookup(GradientPart):
    """Gradients by a table from which each example looked up some rows.

    Args:
        variable: The `keras.Variable`, shape [rows, q].
        rows: The numbers of the rows, int, shape [examples, positions].
        outputs: Gradients by the looked-up rows, shape [examples, positions, q].
    """

    def __init__(self, variable: Any, rows: Tensor, outputs: Tensor) -> None:
        self.variable = variable
        self._rows = rows
        self._outputs = tf.cast(outputs, tf.float32)

    def squared_norms(self, grouping: ClippingGroups = _ALONE) -> Tensor:
        """Sums positions with equal rows first; see `GradientPart`."""
        if isinstance(grouping, Groups):
            return self._squared_norms_by_row(grouping)
        rows, outputs = grouping.joined(self._rows), grouping.joined(self._outputs)
        return squared_norms_by_row(rows, outputs)

    def _squared_norms_by_row(self, grouping: Groups) -> Tensor:
        """Sums by unit and row. A unit of many examples has too many pairs of positions."""
        count, size = self.variable.shape
        units = tf.cast(grouping.unit, tf.int64)[:, None]
        # One key for each pair of a unit and a row of the table.
        keys = tf.reshape(units * count + tf.cast(self._rows, tf.int64), [-1])
        distinct, places = tf.unique(keys)
        outputs = tf.reshape(self._outputs, [-1, size])
        sums = tf.math.unsorted_segment_sum(outputs, places, tf.size(distinct))
        lengths = tf.sqrt(sums_of_squares(outputs))
        magnitudes = tf.math.unsorted_segment_sum(lengths, places, tf.size(distinct))
        positions = tf.cast(tf.size(keys), tf.float32)
        # Twice gamma: this sum and that of `weighted_sum`, which may add in another order.
        largest = tf.sqrt(sums_of_squares(sums)) + 2 * gamma(positions) * magnitudes
        squares = tf.math.unsorted_segment_sum(
            tf.square(largest), distinct // count, tf.cast(grouping.unit[-1], tf.int64) + 1
        )
        return squares * (1 + gamma(positions))

    def weighted_sum(self, weights: Tensor, grouping: ClippingGroups = _ALONE) -> RowSum:
        """Sums by row; see `GradientPart`.

        The sum is in float64. Large positions of one example may cancel each other, and in
        float32 their partial sum would round away what other examples add.
        """
        count, size = self.variable.shape

        def by_table_row(weights: Tensor, outputs: Tensor) -> Tensor:
            weighted = tf.reshape(outputs * tf.reshape(weights, [-1, 1, 1]), [-1, size])
            return tf.math.unsorted_segment_sum(weighted, tf.reshape(self._rows, [-1]), count)

        by_row = grouping.by_row(weights)
        return RowSum(by_table_row, by_row, (self._outputs,), tf.identity, is_exact=True)

    def each(self) -> Tensor:
        """Writes the tables out, mostly zeros; see `GradientPart`."""
        count, size = self.variable.shape
        examples = tf.shape(self._rows)[0]
        rows = self._rows + tf.range(examples, dtype=self._rows.dtype)[:, None] * count
        sums = tf.math.unsorted_segment_sum(
            tf.reshape(self._outputs, [-1, size]), tf.reshape(rows, [-1]), examples * count
        )
        return tf.reshape(sums, [-1, count, size])

    def folded(self, count: int) -> GradientPart:
        """Turns an example's rows into positions; see `GradientPart`."""
        rows, outputs = _unfolded(self._rows, count), _unfolded(self._outputs, count)
        return Lookup(self.variable, rows, outputs)


def weighted_sums(
    model: Any,
    parts: Sequence[GradientPart],
    weightings: Sequence[Mapping[int, Tensor]],
    all_finite: Tensor,
    grouping: ClippingGroups = _ALONE,
) -> list[list[Tensor]]:
    """Sums gradients over examples, multiplied by the weights of their variable.

    Args:
        model: A built `keras.Model`.
        parts: The gradients of all examples, by variable.
        weightings: For each wanted sum, the weights of the units, by the id of a variable.
        all_finite: Scalar bool: whether all squared norms are finite, also those of units with
            weight 0.
        grouping: As in `clipped_sum`.

    Returns:
        For each weighting, the sum for each of the model's trainable variables.
    """
    wanted = [
        part.weighted_sum(weights[id(part.variable)], grouping)
        for weights in weightings
        for part in parts
    ]
    values = iter(summed(wanted, all_finite))
    results = []
    for _ in weightings:
        sums = {id(part.variable): next(values) for part in parts}
        results.append(
            [
                sums[id(v)] if id(v) in sums else tf.zeros(v.shape)
                for v in model.trainable_variables
            ]
        )
    return results


def _weighted_product(weights: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Sums the products of all examples and positions, each times its example's weight."""
    p, q = inputs.shape[2], outputs.shape[2]
    # The smaller factor is multiplied by the weights. At equal sizes it is the inputs, which
    # several products may share.
    if p <= q:
        inputs *= tf.reshape(weights, [-1, 1, 1])
    else:
        outputs *= tf.reshape(weights, [-1, 1, 1])
    return tf.matmul(
        tf.reshape(inputs, [-1, p]), tf.reshape(outputs, [-1, q]), transpose_a=True
    )


def _contracted(weights: Tensor, gradients: Tensor) -> Tensor:
    """Sums gradients, each times its weight. `tf.tensordot` takes much longer to trace."""
    shape = gradients.shape[1:]
    rows = tf.reshape(gradients, [-1, math.prod(shape)])
    return tf.reshape(tf.matmul(tf.reshape(weights, [1, -1]), rows), shape)


def _unfolded(factor: Tensor, count: int) -> Tensor:
    """Concatenates an example's rows, shape [examples, count * positions, ...]."""
    positions = factor.shape[1] if factor.shape[1] is not None else tf.shape(factor)[1]
    return tf.reshape(factor, [-1, count * positions, *factor.shape[2:]])


def _gram_is_smaller(positions: int | None, p: int, q: int) -> bool:
    return positions is not None and 2 * positions**2 <= p * q


def _of_written(gradients: Tensor) -> Tensor:
    return sums_of_squares(gradients) * _read_again()


def _read_again() -> float:
    """Bounds the factor by which squares grow when a matrix product rounds its factors."""
    return float((1 + 2 * factor_unit()) ** 2 * (1 + gamma(4)))
