"""What the first server knows of updates: which were made, how old their weights were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

Tensor = Any

_REMEMBERED = 4096  # steps that may be made a second time, after a worker was lost
MOST_UPDATES = 8  # of one step, at most: a model's own train step may have several


@dataclass(frozen=True)
class Staleness:
    """How old the weights were with which gradients had been computed.

    Attributes:
        updates: Updates applied.
        mean: Updates applied between a step's reading of the weights and its own, on average.
        maximum: The most of them.
    """

    updates: int
    mean: float
    maximum: int


class UpdateLog:
    """What the first server remembers of updates: their number, their age, and a lock.

    Args:
        server: The device.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        with tf.device(server):
            self.section = tf.CriticalSection(name="tfdist_updates")
            self.version = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._sum = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._most = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._made = tf.Variable(
                tf.fill([MOST_UPDATES, _REMEMBERED], tf.constant(-1, tf.int64)), trainable=False
            )

    def clear(self) -> None:
        """Forgets the steps of an earlier `fit`."""
        for variable in (self.version, self._sum, self._most):
            variable.assign(0)
        self._made.assign(tf.fill([MOST_UPDATES, _REMEMBERED], tf.constant(-1, tf.int64)))

    def staleness(self) -> Staleness:
        """Reads how old weights were."""
        updates = int(self.version.numpy())
        mean = int(self._sum.numpy()) / updates if updates else 0.0
        return Staleness(updates, mean, int(self._most.numpy()))

    def once(self, number: Tensor, part: int, change: Callable[[], None]) -> None:
        """Does what a step changes, unless it was done: a lost worker's step is made again.

        Args:
            number: Scalar int64, of the step.
            part: Which of the step's changes this is.
            change: Assigns variables.
        """
        with tf.device(self.server):
            number = tf.identity(number)
            place = number % _REMEMBERED

            def do() -> Tensor:
                change()
                self._made.scatter_nd_update([[part, place]], [number])
                return tf.constant(True)

            def guarded() -> Tensor:
                with tf.device(self.server):
                    fresh = self._made[part, place] != number
                    return tf.cond(fresh, do, lambda: tf.constant(False))

            self.section.execute(guarded)

    def note(self, read: Tensor) -> None:
        """Counts an update.

        Args:
            read: The number of updates when the weights were read.
        """
        age = self.version - read
        self._sum.assign_add(age)
        self._most.assign(tf.maximum(self._most, age))
        self.version.assign_add(1)
