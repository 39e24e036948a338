"""Gradients that travel in half precision."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfdist.step.exchange import Contribution, Exchange, Sums
from tfdist.strategies.base import Strategy

Tensor = Any
_TYPES = {"bf16": tf.bfloat16, "fp16": tf.float16}


@dataclass(frozen=True)
class HalfPrecision:
    """Makes the exchange; see `ExchangeMaker`.

    Attributes:
        name: "bf16" or "fp16".
    """

    name: str

    def make(self, model: Any, strategy: Strategy) -> HalfExchange:
        """Makes the exchange.

        Args:
            model: Any.
            strategy: Where the replicas are.
        """
        factor = strategy.place.num_shares / strategy.predivide
        return HalfExchange(_TYPES[self.name], factor)


class HalfExchange(Exchange):
    """Rounds dense gradients of 32 and 64 bits before they travel.

    Mean gradients of replicas travel, since their parts of the global gradient may be too
    small for fp16, and are averaged after the sum. Where that sum may be too large, they are
    divided before.

    Args:
        wire_type: The type in which they travel.
        factor: By which parts of the gradient are multiplied to travel.
    """

    def __init__(self, wire_type: tf.DType, factor: float) -> None:
        self._wire_type = wire_type
        self._factor = factor

    def reduce(
        self, strategy: Strategy, given: Contribution, phase: Hashable
    ) -> tuple[Sums, Callable[[Tensor], None]]:
        """Sums rounded gradients; see `Exchange`."""
        sent = [self._rounded(gradient) for gradient in given.gradients]
        summed, others = strategy.reduce_step(sent, given.others, given.share, given.variables)
        back = [
            self._widened(total, gradient)
            for total, gradient in zip(summed, given.gradients, strict=True)
        ]
        return (back, others), lambda counts: None

    def _rounded(self, gradient: Tensor) -> Tensor:
        if not _is_wide(gradient):
            return gradient
        return tf.cast(gradient * tf.cast(self._factor, gradient.dtype), self._wire_type)

    def _widened(self, total: Tensor, gradient: Tensor) -> Tensor:
        if not _is_wide(gradient):
            return total
        return tf.cast(total, gradient.dtype) / tf.cast(self._factor, gradient.dtype)


def _is_wide(gradient: Tensor) -> bool:
    dense = not isinstance(gradient, tf.IndexedSlices)
    return dense and gradient.dtype in (tf.float32, tf.float64)
