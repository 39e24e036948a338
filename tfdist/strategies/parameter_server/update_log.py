"""The log of updates on the first server: which steps are applied, and their staleness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

Tensor = Any

_LOGGED_STEPS = 4096  # the last steps, which may run a second time if a worker is lost
MAX_UPDATES = 8  # updates of one step: a custom train step may have several


@dataclass(frozen=True)
class Staleness:
    """The staleness of gradients in asynchronous training.

    The staleness of a step is the number of updates between its reading of the weights and
    its own update.

    Attributes:
        updates: Number of updates.
        mean: Mean staleness of a step.
        maximum: Largest staleness of a step.
    """

    updates: int
    mean: float
    maximum: int


class UpdateLog:
    """The number of updates, their staleness, and the lock under which they are applied.

    Args:
        server: The device of the first server.

    Attributes:
        section: The lock.
        version: Number of updates applied so far.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        with tf.device(server):
            self.section = tf.CriticalSection(name="tfdist_updates")
            self.version = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._sum = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._maximum = tf.Variable(0, dtype=tf.int64, trainable=False)
            # The last steps whose changes are applied, by the change's part of its step.
            self._applied = tf.Variable(
                tf.fill([MAX_UPDATES, _LOGGED_STEPS], tf.constant(-1, tf.int64)),
                trainable=False,
            )

    def clear(self) -> None:
        """Forgets the steps of an earlier `fit`."""
        for variable in (self.version, self._sum, self._maximum):
            variable.assign(0)
        self._applied.assign(tf.fill([MAX_UPDATES, _LOGGED_STEPS], tf.constant(-1, tf.int64)))

    def staleness(self) -> Staleness:
        """Reads the staleness of all updates."""
        updates = int(self.version.numpy())
        mean = int(self._sum.numpy()) / updates if updates else 0.0
        return Staleness(updates, mean, int(self._maximum.numpy()))

    def once(self, number: Tensor, part: int, change: Callable[[], None]) -> None:
        """Applies a change of a step, unless it is applied already.

        If a worker is lost, another worker runs its step again. Then part of the changes may
        be applied already.

        Args:
            number: Scalar int64, the step number.
            part: The index of the change among those of the step.
            change: Assigns variables.
        """
        with tf.device(self.server):
            # Copied to the server before the lock is taken.
            number = tf.identity(number)
            slot = number % _LOGGED_STEPS

            def apply() -> Tensor:
                change()
                # In the critical section as well. So a change and the note of it are both made,
                # or neither.
                self._applied.scatter_nd_update([[part, slot]], [number])
                return tf.constant(True)

            def apply_if_new() -> Tensor:
                with tf.device(self.server):
                    is_new = self._applied[part, slot] != number
                    return tf.cond(is_new, apply, lambda: tf.constant(False))

            self.section.execute(apply_if_new)

    def count(self, version_read: Tensor) -> None:
        """Counts an update and its staleness.

        Args:
            version_read: The value of `version` when the weights were read.
        """
        staleness = self.version - version_read
        self._sum.assign_add(staleness)
        self._maximum.assign(tf.maximum(self._maximum, staleness))
        self.version.assign_add(1)
