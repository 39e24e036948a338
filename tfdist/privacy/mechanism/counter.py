"""The count of private steps, which neither users nor callbacks can change."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Tensor = Any


class StepCounter:
    """Counts steps inside the step function.

    The counter is not a part of the model or its optimizer, so no callback, file or `assign`
    reaches it. A step counts when it begins, so an interrupted step counts too. `end` tells
    the counter of steps that all workers agreed not to make.
    """

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            # Variables, since a function is traced once and may run several steps per call.
            self._started = tf.Variable(tf.zeros([], tf.int64), trainable=False)
            self._finished = tf.Variable(tf.zeros([], tf.int64), trainable=False)
            self._left_out = tf.Variable(tf.zeros([], tf.int64), trainable=False)
            self._first = tf.Variable(tf.zeros([], tf.int64), trainable=False)
            self._preceding = tf.Variable(tf.zeros([], tf.int64), trainable=False)

    def restart(self) -> None:
        """Sets the count to 0."""
        for variable in (self._started, self._finished, self._left_out):
            variable.assign(0)

    def number_from(self, first: int) -> None:
        """Sets the number of the first step.

        Args:
            first: The number that `begin` returns for it.
        """
        self._first.assign(first)

    def count_from(self, preceding: int) -> None:
        """Sets how many steps of the training precede the first one.

        Args:
            preceding: The number of steps. `place` adds it.
        """
        self._preceding.assign(preceding)

    def place(self, number: Tensor) -> Tensor:
        """Returns a step's place in its training, in which left-out steps do not count.

        Args:
            number: The number of the last step, from `begin`.

        Returns:
            The number of steps before it, scalar int64.
        """
        with tf.device("CPU:0"):
            first, left_out = self._first.read_value(), self._left_out.read_value()
            return number - first - left_out + self._preceding.read_value()

    def begin(self, after: Tensor) -> Tensor:
        """Counts a step.

        Args:
            after: A tensor of the step's data. If reading it raises an error, such as at the
                end of the data, the step is not counted.

        Returns:
            The number of the step, scalar int64. Each number is returned once.
        """
        with tf.control_dependencies([after]), tf.device("CPU:0"):
            started = self._started.assign_add(1, read_value=True)
            return tf.identity(started) - 1 + self._first.read_value()

    def steps_before(self, number: Tensor) -> Tensor:
        """Returns how many steps have begun before a step, since `restart`.

        Args:
            number: The step's number, from `begin`.
        """
        with tf.device("CPU:0"):
            return number - self._first.read_value()

    def end(self, is_made: Tensor) -> None:
        """Ends a step.

        Args:
            is_made: Scalar bool: whether the step has changed the weights.
        """
        with tf.device("CPU:0"):
            count = tf.cast(is_made, tf.int64)
            self._finished.assign_add(count)
            self._left_out.assign_add(1 - count)

    @property
    def steps(self) -> int:
        """The number of steps that may have changed the weights."""
        return int(self._started.numpy()) - int(self._left_out.numpy())

    @property
    def finished(self) -> int:
        """The number of steps that have ended and changed the weights."""
        return int(self._finished.numpy())
