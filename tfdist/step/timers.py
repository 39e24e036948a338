"""Clocks inside a step: how long it waited for its data, and how long its reduction took.

A step draws its data and reduces gradients in one traced function. Python sees only the
beginning and the end of it, so these clocks are operations of the function itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfdist import _keras

Tensor = Any


class StepTimes(NamedTuple):
    """The counts and times of all steps so far.

    Attributes:
        shares: Number of shares drawn.
        steps: Number of steps made with them.
        data: Seconds that steps waited for their data.
        reducing: Seconds that steps spent in reductions. This includes the wait for slower
            workers.
    """

    shares: float
    steps: float
    data: float
    reducing: float


class StepTimers:
    """Counts and times steps. Another thread can read it while a step runs."""

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            self._values = tf.Variable(tf.zeros([4], tf.float64), trainable=False)

    def read(self) -> StepTimes:
        """Returns the counts and times so far."""
        # Each step reads it, and `Variable.read_value` takes five times as long.
        read = tf.raw_ops.ReadVariableOp(resource=self._values.handle, dtype=tf.float64)
        return StepTimes(*read.numpy().tolist())

    def counts(self) -> tuple[int, int]:
        """Returns the numbers of shares drawn and of steps made."""
        times = self.read()
        return int(times.shares), int(times.steps)

    def draw(self, next_share: Any, iterator: Any) -> Any:
        """Draws a step's share, and times it.

        Args:
            next_share: Returns the next share of an iterator.
            iterator: The iterator.
        """
        began = now()
        # Otherwise the graph could draw the data before it reads the clock.
        with tf.control_dependencies([began]):
            share = next_share(iterator)
        with tf.control_dependencies(_tensors(share)):
            self._add([1.0, 0.0, now(share) - began, 0.0])
        return share

    def note_step(self, result: Any, reducing: Tensor) -> None:
        """Counts a step.

        Args:
            result: The result of the step. The count waits for it.
            reducing: Seconds spent in reductions, scalar float64.
        """
        with tf.control_dependencies(_tensors(result)):
            self._add([0.0, 1.0, 0.0, reducing])

    def _add(self, values: Sequence[Tensor]) -> None:
        with tf.device("CPU:0"):
            self._values.assign_add(tf.stack([tf.cast(v, tf.float64) for v in values]))


def has_clocks() -> bool:
    """Returns whether there are clocks: with deterministic ops, TensorFlow allows none."""
    return not _keras.is_deterministic()


def now(after: Any = ()) -> Tensor:
    """Returns the time in seconds, a scalar float64 tensor; 0 if there are no clocks.

    Args:
        after: Nested tensors that must be computed before the clock is read.
    """
    if not has_clocks():
        return tf.zeros([], tf.float64)
    with tf.control_dependencies(_tensors(after)), tf.device("CPU:0"):
        return tf.timestamp()


def _tensors(nest: Any) -> list[Tensor]:
    leaves = tf.nest.flatten(nest, expand_composites=True)
    return [leaf for leaf in leaves if tf.is_tensor(leaf)]
