"""Gradients that replicas exchange in half precision."""

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
            model: Not used.
            strategy: The strategy on whose replicas the model trains.
        """
        factor = strategy.place.num_shares / strategy.predivide
        return HalfExchange(_TYPES[self.name], factor)


class HalfExchange(Exchange):
    """Rounds dense gradients of 32 and 64 bits before the collective.

    A replica's part of the global gradient may be too small for fp16. So each replica sends
    its mean gradient, which is larger by the number of replicas, and the sum is divided by
    that number. If the sum may be too large, each replica first divides by `predivide`.

    Args:
        wire_type: The type in which gradients are sent.
        factor: The factor by which a replica multiplies its part of the gradient.
    """

    def __init__(self, wire_type: tf.DType, factor: float) -> None:
        self._wire_type = wire_type
        self._factor = factor

    def reduce(
        self, strategy: Strategy, contribution: Contribution, phase: Hashable
    ) -> tuple[Sums, Callable[[Tensor], None]]:
        """Sums rounded gradients; see `Exchange`."""
        rounded = [self._round(gradient) for gradient in contribution.gradients]
        summed, others = strategy.reduce_step(
            rounded, contribution.others, contribution.share, contribution.variables
        )
        gradients = [
            self._widen(total, gradient)
            for total, gradient in zip(summed, contribution.gradients, strict=True)
        ]
        return (gradients, others), lambda counts: None

    def _round(self, gradient: Tensor) -> Tensor:
        if not _is_wide(gradient):
            return gradient
        return tf.cast(gradient * tf.cast(self._factor, gradient.dtype), self._wire_type)

    def _widen(self, total: Tensor, gradient: Tensor) -> Tensor:
        if not _is_wide(gradient):
            return total
        return tf.cast(total, gradient.dtype) / tf.cast(self._factor, gradient.dtype)


def _is_wide(gradient: Tensor) -> bool:
    dense = not isinstance(gradient, tf.IndexedSlices)
    return dense and gradient.dtype in (tf.float32, tf.float64)
