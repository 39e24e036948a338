"""Samplers: which examples make up a global step, as a function of the seed and the step.

Nothing else decides it: not a worker's history, its rank, or the number of workers. So
every replica finds the same rows, takes its slice, and a run that is resumed at step t,
on any number of workers, goes on with the examples it would have seen.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

Tensor = Any


class Sampler(abc.ABC):
    """Chooses the rows of each global step."""

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Says how many steps make an epoch.

        Args:
            num_rows: Examples in the data, at least 1.
            batch_size: Examples of a full global batch, at least 1.

        Returns:
            Steps until every example was drawn once; the last batch may be smaller.
        """
        return -(-num_rows // batch_size)

    @abc.abstractmethod
    def rows(self, step: Tensor, *, num_rows: int, batch_size: int, seed: int) -> Tensor:
        """Gives the rows of one global batch.

        Args:
            step: Scalar int64 tensor, the steps before this one since training began.
            num_rows: Examples in the data.
            batch_size: Examples of a full global batch.
            seed: Any int32; another seed gives another order.

        Returns:
            int64 tensor of shape [n], 1 <= n <= batch_size, values in [0, num_rows).
        """


@dataclass(frozen=True)
class Sequential(Sampler):
    """Takes rows in the order they have."""

    def rows(self, step: Tensor, *, num_rows: int, batch_size: int, seed: int) -> Tensor:
        """Gives the rows of one global batch; see `Sampler.rows`."""
        start = step % self.steps_per_epoch(num_rows, batch_size) * batch_size
        return tf.range(start, tf.minimum(start + batch_size, num_rows))


@dataclass(frozen=True)
class Uniform(Sampler):
    """Draws every row once an epoch, in an order of its own each epoch. The default.

    The order is a pseudo-random permutation evaluated at the positions of the batch, so
    it needs no memory, however many rows there are. It is TensorFlow's `index_shuffle`,
    a small-domain block cipher (Simon; Beaulieu et al., 2013).

    Args:
        by_batch: Keep the rows of a batch together and shuffle the batches, as Keras's
            `shuffle="batch"` does, for data that is slow to read out of order.
    """

    by_batch: bool = False

    def rows(self, step: Tensor, *, num_rows: int, batch_size: int, seed: int) -> Tensor:
        """Gives the rows of one global batch; see `Sampler.rows`."""
        steps = self.steps_per_epoch(num_rows, batch_size)
        key = tf.stack([tf.constant(seed, tf.int64), step // steps])
        if self.by_batch:
            batch = permute(step % steps, steps, key)
            return Sequential().rows(batch, num_rows=num_rows, batch_size=batch_size, seed=0)
        positions = Sequential().rows(step, num_rows=num_rows, batch_size=batch_size, seed=0)
        return permute(positions, num_rows, key)


def permute(positions: Tensor, size: int, key: Tensor) -> Tensor:
    """Evaluates a pseudo-random permutation of range(size) at some positions.

    Args:
        positions: int64 tensor, values in [0, size).
        size: How many values are permuted.
        key: int64 tensor of shape [2] that chooses the permutation.

    Returns:
        int64 tensor of the shape of `positions`.
    """
    last = tf.constant(size - 1, tf.int64)
    return tf.random.experimental.index_shuffle(positions, key, last)


def from_shuffle(shuffle: bool | str) -> Sampler:
    """Translates the `shuffle` argument of `fit`.

    Args:
        shuffle: True, False or "batch".
    """
    if shuffle == "batch":
        return Uniform(by_batch=True)
    return Uniform() if shuffle else Sequential()
