"""A count of private steps that is tfdist's own: nothing a user can set moves it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Tensor = Any


class StepCounter:
    """Counts steps inside of the step function, where they are made.

    It is no part of the model or its optimizer: no callback, no file and no `assign` reaches
    it. A step counts when it begins, so that one that breaks off in its middle counts too; of
    steps that all workers agreed not to make it is told.
    """

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            # In a variable, since functions are traced once, and several steps at once.
            self._begun = tf.Variable(tf.zeros([], tf.int64), trainable=False)
            self._made = tf.Variable(tf.zeros([], tf.int64), trainable=False)
            self._left_out = tf.Variable(tf.zeros([], tf.int64), trainable=False)
            self._first = tf.Variable(tf.zeros([], tf.int64), trainable=False)
            self._before = tf.Variable(tf.zeros([], tf.int64), trainable=False)

    def restart(self) -> None:
        """Begins to count at 0."""
        for variable in (self._begun, self._made, self._left_out):
            variable.assign(0)

    def number_from(self, first: int) -> None:
        """Sets the number of the first step.

        Args:
            first: What `begin` gives for it.
        """
        self._first.assign(first)

    def count_from(self, before: int) -> None:
        """Sets how many steps of the training came before.

        Args:
            before: What `place` adds.
        """
        self._before.assign(before)

    def place(self, number: Tensor) -> Tensor:
        """Gives a step's place in its training, which only steps that are made move.

        Args:
            number: What `begin` gave for the step, the last one.

        Returns:
            Steps before it, scalar int64.
        """
        with tf.device("CPU:0"):
            first, left_out = self._first.read_value(), self._left_out.read_value()
            return number - first - left_out + self._before.read_value()

    def begin(self, after: Tensor) -> Tensor:
        """Counts a step.

        Args:
            after: Data of the step: where there is none, nothing is counted.

        Returns:
            The number of the step, scalar int64; each number is given once.
        """
        with tf.control_dependencies([after]), tf.device("CPU:0"):
            begun = self._begun.assign_add(1, read_value=True)
            return tf.identity(begun) - 1 + self._first.read_value()

    def before(self, number: Tensor) -> Tensor:
        """Says how many steps were begun before one, since `restart`.

        Args:
            number: The step's, from `begin`.
        """
        with tf.device("CPU:0"):
            return number - self._first.read_value()

    def end(self, is_made: Tensor) -> None:
        """Notes that a step is over.

        Args:
            is_made: Scalar bool: whether it has changed anything.
        """
        with tf.device("CPU:0"):
            made = tf.cast(is_made, tf.int64)
            self._made.assign_add(made)
            self._left_out.assign_add(1 - made)

    @property
    def steps(self) -> int:
        """Steps that may have changed something."""
        return int(self._begun.numpy()) - int(self._left_out.numpy())

    @property
    def finished(self) -> int:
        """Steps that came to their end, and have changed something."""
        return int(self._made.numpy())
