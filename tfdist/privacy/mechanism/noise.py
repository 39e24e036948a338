"""Gaussian noise. Each replica has its own stream of random numbers."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.privacy.mechanism.normals import standard_normal

Tensor = Any


class Noise:
    """Streams of independent Gaussian numbers, one for each replica of this process.

    The numbers of a step are a function of a replica's secret words and the step's number. See
    `standard_normal`.

    Args:
        first_replica: The global number of this process's first replica.
        local_replicas: The number of replicas of this process.
    """

    def __init__(self, first_replica: int, local_replicas: int) -> None:
        self._first, self._count = first_replica, local_replicas
        with tf.init_scope(), tf.device("CPU:0"):
            # Variables, since functions are traced once and keys must be new in each `fit`.
            # Correlated noise of earlier steps is drawn again after a resumption, with the
            # secrets of the earlier processes. So there is one row of words for each process.
            self._words = tf.Variable(
                tf.zeros([1, local_replicas, 2], tf.int64),
                trainable=False,
                shape=tf.TensorShape([None, local_replicas, 2]),
            )
            self._begins = tf.Variable(
                tf.zeros([1], tf.int64), trainable=False, shape=tf.TensorShape([None])
            )

    def renew(self, seed: int | None) -> None:
        """Begins new streams.

        Args:
            seed: The seed of the streams. Whoever knows it can compute the noise. None takes
                127 bits for each replica from the operating system.
        """
        if seed is not None:
            self.go_on([(0, seed)])
            return
        words = [(secrets.randbits(64), secrets.randbits(63)) for _ in range(self._count)]
        self._set([0], [np.array(words, np.uint64)])

    def go_on(self, secrets_from: Sequence[tuple[int, int]]) -> None:
        """Sets the secrets of the streams, also those of steps that earlier processes made.

        Args:
            secrets_from: Pairs of a step and the secret of the noise from this step on, sorted
                by step. `correlated` takes noise before the first pair as 0.
        """
        words = [
            [
                np.random.SeedSequence((secret, replica)).generate_state(2, np.uint64)
                for replica in range(self._first, self._first + self._count)
            ]
            for _, secret in secrets_from
        ]
        self._set([begin for begin, _ in secrets_from], words)

    def _set(self, begins: Sequence[int], words: Sequence[Any]) -> None:
        self._begins.assign(np.array(begins, np.int64))
        self._words.assign(np.array(words, np.uint64).view(np.int64))

    def correlated(
        self, count: int, replica: Tensor, step: Tensor, factors: Sequence[float]
    ) -> Tensor:
        """Returns the sum of the numbers of a step and of steps before, each times a factor.

        The numbers of steps before are drawn again, so the memory does not grow with the
        number of factors.

        Args:
            count: How many numbers.
            replica: The replica's global number.
            step: Scalar integer.
            factors: The factor of the step's own numbers, of those of the step before, and so
                on.

        Returns:
            float64 tensor of shape [count].
        """
        with tf.device("CPU:0"):
            preceding = tf.cast(step, tf.int64) - self._begins.read_value()[0]
        lags = tf.cast(tf.minimum(preceding + 1, len(factors)), tf.int32)
        factor_of_lag = tf.constant(factors, tf.float64)

        def add(lag: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            normal = self.normal(
                count, replica, tf.cast(step, tf.int64) - tf.cast(lag, tf.int64)
            )
            return lag + 1, total + factor_of_lag[lag] * normal

        _, total = tf.while_loop(
            lambda lag, _: lag < lags,
            add,
            (tf.constant(0), tf.zeros([count], tf.float64)),
            parallel_iterations=1,
        )
        return total

    def normal(self, count: int, replica: Tensor, step: Tensor) -> Tensor:
        """Draws independent normal numbers of mean 0 and variance 1.

        Args:
            count: How many numbers.
            replica: The replica's global number.
            step: Scalar integer, different in each step.

        Returns:
            float64 tensor of shape [count].
        """
        with tf.device("CPU:0"):
            words, begins = self._words.read_value(), self._begins.read_value()
            has_begun = tf.cast(begins <= tf.cast(step, tf.int64), tf.int32)
            row = tf.maximum(tf.reduce_sum(has_begun) - 1, 0)
        words = tf.bitcast(words[row, replica - self._first], tf.uint64)
        # The low word counts blocks within a step, so no two steps share a counter.
        low = tf.zeros([], tf.uint64)
        counter = tf.stack([low, words[1] + tf.cast(step, tf.uint64)])
        return standard_normal(count, words[:1], counter)


def like(flat: Tensor, variables: Sequence[Any]) -> list[Tensor]:
    """Splits a vector into tensors with the shapes of variables.

    Args:
        flat: A vector with as many numbers as all variables together.
        variables: `keras.Variable`s.
    """
    sizes = [math.prod(v.shape) for v in variables]
    parts = tf.split(flat, sizes) if len(sizes) > 1 else [flat]
    return [tf.reshape(part, v.shape) for part, v in zip(parts, variables, strict=True)]
