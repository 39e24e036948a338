"""Gaussian noise, for each replica from a stream of its own."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Tensor = Any
_PHILOX = tf.random.Algorithm.PHILOX.value


class Noise:
    """Streams of independent Gaussian numbers, one for each replica of this process.

    The numbers of a step are a function of a replica's secret words and of the step's number.
    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
    counter into bits; Box and Muller ("A note on the generation of random normal deviates",
    1958) turn three words of them into two normal numbers, up to 9.49 standard deviations.

    Args:
        first_replica: Global number of this process's first replica.
        local_replicas: Replicas of this process.
    """

    def __init__(self, first_replica: int, local_replicas: int) -> None:
        self._first, self._count = first_replica, local_replicas
        with tf.init_scope(), tf.device("CPU:0"):
            # Variables, since functions are traced once and keys must be new in each `fit`.
            # One row of words for steps from 0 on, and one more for each restart.
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
            seed: Makes them known; None takes 127 bits a replica from the operating system.
        """
        if seed is not None:
            self.go_on([(0, seed)])
            return
        words = [(secrets.randbits(64), secrets.randbits(63)) for _ in range(self._count)]
        self._set([0], [np.array(words, np.uint64)])

    def go_on(self, secrets_from: Sequence[tuple[int, int]]) -> None:
        """Begins streams, or goes on with them, that are known to who knows the secrets.

        Args:
            secrets_from: From which step on which secret makes them, in order of steps. Before
                the first `correlated` has no noise to take back.
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
        """Adds up the numbers that `normal` gives for a step and those before it.

        Args:
            count: How many.
            replica: The replica's global number.
            step: Scalar integer.
            factors: Of the step's own numbers, then of those of the step before, and so on.

        Returns:
            float64 tensor of shape [count].
        """
        with tf.device("CPU:0"):
            before = tf.cast(step, tf.int64) - self._begins.read_value()[0]
        lags = tf.cast(tf.minimum(before + 1, len(factors)), tf.int32)
        times = tf.constant(factors, tf.float64)

        def add(lag: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            drawn = self.normal(
                count, replica, tf.cast(step, tf.int64) - tf.cast(lag, tf.int64)
            )
            return lag + 1, total + times[lag] * drawn

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
            count: How many.
            replica: The replica's global number.
            step: Scalar integer, another one in each step.

        Returns:
            float64 tensor of shape [count].
        """
        with tf.device("CPU:0"):
            words, begins = self._words.read_value(), self._begins.read_value()
            begun = tf.cast(begins <= tf.cast(step, tf.int64), tf.int32)
            row = tf.maximum(tf.reduce_sum(begun) - 1, 0)
        words = tf.bitcast(words[row, replica - self._first], tf.uint64)
        # The low word counts blocks of a step.
        low = tf.zeros([], tf.uint64)
        counter = tf.stack([low, words[1] + tf.cast(step, tf.uint64)])
        return standard_normal(count, words[:1], counter)


def standard_normal(count: int, key: Tensor, counter: Tensor) -> Tensor:
    """Turns a key and a counter into normal numbers.

    Args:
        count: How many.
        key: uint64 of shape [1].
        counter: uint64 of shape [2], the low word first.

    Returns:
        float64 tensor of shape [count]; see `from_words`.
    """
    half = -(-count // 2)
    words = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[3, half], key=key, counter=counter, alg=_PHILOX, dtype=tf.uint32
    )
    return from_words(words)[:count]


def from_words(words: Tensor) -> Tensor:
    """Turns random words into normal numbers, by Box and Muller's method.

    A radius comes from 64 bits, in float64, so it ends at sqrt(130 ln 2) = 9.49: beyond that
    is a probability of less than 2^-64, both sides together. The direction is one of 2^32, in
    float32, which takes a quarter of the time: its cosine may be wrong by 2^-24 of itself, but
    the numbers, products with a fine radius, have no gaps.

    Args:
        words: uint32 of shape [3, n].

    Returns:
        float64 tensor of shape [2 n].
    """
    high, low = tf.cast(words[0], tf.float64), tf.cast(words[1], tf.float64)
    # Floats are finest near 0, where the tail is: a shift by half a step, and no 1 - u.
    uniform = high * 2.0**-32 + (low * 2.0**-64 + 2.0**-65)
    radius = tf.sqrt(-2.0 * tf.math.log(uniform))
    angle = tf.cast(tf.bitcast(words[2], tf.int32), tf.float32) * (math.pi * 2.0**-31)
    directions = (tf.cast(f(angle), tf.float64) for f in (tf.cos, tf.sin))
    return tf.concat([radius * d for d in directions], 0)


def like(flat: Tensor, variables: Sequence[Any]) -> list[Tensor]:
    """Cuts a vector into the shapes of variables.

    Args:
        flat: As many numbers as the variables have together.
        variables: `keras.Variable`s.
    """
    sizes = [math.prod(v.shape) for v in variables]
    parts = tf.split(flat, sizes) if len(sizes) > 1 else [flat]
    return [tf.reshape(part, v.shape) for part, v in zip(parts, variables, strict=True)]
