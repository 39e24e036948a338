"""Clocks inside of a step: when its data had come, and how long its reduction took.

A step draws its data and exchanges in one traced function, of which Python sees only the
beginning and the end. These timers are made on the processor, in the function itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist import _keras

Tensor = Any


class Times(NamedTuple):
    """What the timers have counted.

    Attributes:
        shares: Shares drawn.
        steps: Steps made of them.
        data: Seconds that steps waited for their data.
        reducing: Seconds from where this process had its part of a step's sums to where it
            had the sums of all: waiting for the others, and the exchange itself.
    """

    shares: float
    steps: float
    data: float
    reducing: float


class StepTimers:
    """Counts what steps do; can be read from another thread while one is under way."""

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            self._values = tf.Variable(tf.zeros([4], tf.float64), trainable=False)

    def read(self) -> Times:
        """Gives what was counted so far."""
        # Every step does it: a Variable's own way to its value takes five times as long.
        read = tf.raw_ops.ReadVariableOp(resource=self._values.handle, dtype=tf.float64)
        return Times(*read.numpy().tolist())

    def counted(self) -> tuple[int, int]:
        """Gives how many shares were drawn, and how many steps made."""
        times = self.read()
        return int(times.shares), int(times.steps)

    def draw(self, next_share: Any, iterator: Any) -> Any:
        """Draws what a step needs, and notes how long that took.

        Args:
            next_share: Draws from an iterator.
            iterator: The iterator.
        """
        began = now()
        with tf.control_dependencies([began]):
            share = next_share(iterator)
        with tf.control_dependencies(_tensors(share)):
            self._add([1.0, 0.0, now(share) - began, 0.0])
        return share

    def note_step(self, result: Any, reducing: Tensor) -> None:
        """Notes that a step was made.

        Args:
            result: What it gives.
            reducing: Seconds, scalar float64.
        """
        with tf.control_dependencies(_tensors(result)):
            self._add([0.0, 1.0, 0.0, reducing])

    def _add(self, values: Sequence[Tensor]) -> None:
        with tf.device("CPU:0"):
            self._values.assign_add(tf.stack([tf.cast(v, tf.float64) for v in values]))


def has_clocks() -> bool:
    """Tells whether times are known: TensorFlow refuses its clock to deterministic programs."""
    return not _keras.is_deterministic()


def now(after: Any = ()) -> Tensor:
    """Gives the time in seconds, a scalar float64 tensor; 0 where there are no clocks.

    Args:
        after: Tensors, nested, that must be known before.
    """
    if not has_clocks():
        return tf.zeros([], tf.float64)
    with tf.control_dependencies(_tensors(after)), tf.device("CPU:0"):
        return tf.timestamp()


def _tensors(nest: Any) -> list[Tensor]:
    leaves = tf.nest.flatten(nest, expand_composites=True)
    return [leaf for leaf in leaves if tf.is_tensor(leaf)]
