"""The keys of the random numbers of rows, such as dropout masks, in private training."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfdist._keras import RowKeys, row_numbers

Tensor = Any


class Masks:
    """A secret of the run, from which each row gets its own random numbers.

    An example's contribution to a step must be a function of this example, and of random
    numbers that do not depend on other examples. Otherwise the sum over examples changes by
    more than one clipped gradient when an example is left out: the examples behind it would
    move to other places, and get other random numbers. So the numbers that layers draw for a
    row follow from the secret, the draw and the row's contents, not from its place in the
    batch.
    """

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            # A variable, since functions are traced once and the secret is new in each `fit`.
            self._secret = tf.Variable(tf.zeros([2], tf.int64), trainable=False)

    def renew(self, seed: int) -> None:
        """Sets the secret of a `fit`.

        Args:
            seed: A number that is equal on all workers. It is secret unless the user chose it.
        """
        words = np.random.SeedSequence((seed, *b"masks")).generate_state(2, np.uint64)
        self._secret.assign(words.view(np.int64))

    def keys(self, data: Any, offset: Tensor, copies: int) -> RowKeys:
        """Returns the keys of a replica's rows.

        Args:
            data: The replica's batch.
            offset: As in `row_numbers`.
            copies: The number of rows of an example.
        """
        with tf.device("CPU:0"):
            secret = self._secret.read_value()
            rows = row_numbers(data, offset, copies)
        return RowKeys(rows, secret)
