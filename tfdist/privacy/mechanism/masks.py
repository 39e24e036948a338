"""What dropout masks and other random numbers of rows follow from in private training."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfdist._keras import RowKeys, row_numbers

Tensor = Any


class Masks:
    """A secret of the run, by which each row has its own random numbers.

    What an example contributes to a step must be a function of this example, and of numbers
    that no other example has a part in: only then is a sum over examples changed by no more
    than one of them when one is left out. So the numbers that layers draw for a row follow from
    the secret, the draw and the row's contents, and not from its place in the batch.
    """

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            # A variable, since functions are traced once and the secret is new in each `fit`.
            self._secret = tf.Variable(tf.zeros([2], tf.int64), trainable=False)

    def renew(self, seed: int) -> None:
        """Begins a `fit`.

        Args:
            seed: The same on all workers, and secret unless the user has chosen it.
        """
        words = np.random.SeedSequence((seed, *b"masks")).generate_state(2, np.uint64)
        self._secret.assign(words.view(np.int64))

    def keys(self, data: Any, offset: Tensor, copies: int) -> RowKeys:
        """Gives the keys of a replica's rows.

        Args:
            data: Its share of a batch.
            offset: As `row_numbers` takes it.
            copies: Rows of an example.
        """
        with tf.device("CPU:0"):
            secret = self._secret.read_value()
            rows = row_numbers(data, offset, copies)
        return RowKeys(rows, secret)
