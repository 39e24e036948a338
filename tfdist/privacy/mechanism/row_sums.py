"""Weighted sums of gradients over rows, exact where float32 would round too much.

A branch of a graph costs much more time to trace than the few operations in it. So the sums of
all variables share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

Tensor = Any
# The most rows whose sum may be in float32. The rounding error of a sum of n equal gradients of
# norm C grows faster than n. On a processor it was 5e-4 C for 1024, and 0.1 C for 65536.
LONG = 1024


@dataclass(frozen=True)
class RowSum:
    """A sum over rows that is not computed yet.

    Attributes:
        function: Computes the sum from `weights` and `factors`.
        weights: Shape [rows], float32. A row with weight 0 adds nothing.
        factors: Tensors with rows as their first axis, float32.
        arranged: Turns the sum into the variable's shape.
        cancels: Scalar bool: whether large terms of a row cancel each other. None if they
            cannot.
        is_exact: Whether the sum is always in float64.
    """

    function: Callable[..., Tensor]
    weights: Tensor
    factors: tuple[Tensor, ...]
    arranged: Callable[[Tensor], Tensor]
    cancels: Tensor | None = None
    is_exact: bool = False

    def plainly(self) -> Tensor:
        """Computes the sum in float32, of factors that are all finite."""
        return self.function(self.weights, *self.factors)

    def exactly(self) -> Tensor:
        """Computes the sum in float64. Rows of weight 0 may be infinite or not a number."""
        # 0 times NaN would be NaN.
        factors = [
            tf.where(tf.reshape(self.weights != 0, [-1] + [1] * (len(f.shape) - 1)), f, 0.0)
            for f in self.factors
        ]
        given = [tf.cast(value, tf.float64) for value in (self.weights, *factors)]
        return tf.cast(self.function(*given), tf.float32)


def summed(sums: Sequence[RowSum], all_finite: Tensor) -> list[Tensor]:
    """Computes sums, in float32 if all are short, finite and without large terms that cancel.

    Args:
        sums: The sums.
        all_finite: Scalar bool: whether all factors are finite.

    Returns:
        Each sum in its variable's shape, float32.
    """
    is_plain = all_finite
    for weights in {id(one.weights): one.weights for one in sums}.values():
        is_plain &= tf.size(weights) <= LONG
    together = [one for one in sums if one.cancels is None and not one.is_exact]
    shared: Iterator[Tensor] = iter(())
    if together:
        shared = iter(
            tf.cond(
                is_plain,
                lambda: [one.plainly() for one in together],
                lambda: [one.exactly() for one in together],
            )
        )

    def value(one: RowSum) -> Tensor:
        if one.is_exact:
            return one.exactly()
        if one.cancels is not None:
            return tf.cond(is_plain & ~one.cancels, one.plainly, one.exactly)
        return next(shared)

    return [one.arranged(value(one)) for one in sums]
