"""The optimizers that clients keep from round to round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist.federated.state import LocalState
from tfdist.step.state import Role, Sharded

Tensor = Any


class KeptOptimizers:
    """A table for each variable of the optimizers, with a row for each client of a replica.

    Args:
        state: The state of local steps.
        slots: The most clients of one replica.
        num_slots: All slots that may be used, over all replicas.
    """

    def __init__(self, state: LocalState, slots: int, num_slots: int) -> None:
        self._state = state
        self._role = Sharded(num_slots)
        self._tables = [
            keras.Variable(
                np.zeros((slots, *variable.shape)),
                dtype=variable.dtype,
                trainable=False,
                name=f"clients_{variable.name}",
            )
            for variable in state.of_optimizers
        ]
        # The updates that the model's optimizers had made when the training began.
        self._first_step = keras.Variable(0, dtype="int64", trainable=False, name="first_step")
        self._has_begun = keras.Variable(0, dtype="int64", trainable=False, name="has_begun")

    @property
    def variables(self) -> list[tuple[Any, Role | Sharded]]:
        """The variables, each with its role."""
        replicated = [(v, Role.REPLICATED) for v in (self._first_step, self._has_begun)]
        return [*replicated, *((table, self._role) for table in self._tables)]

    def reset(self) -> None:
        """Gives every client a new optimizer."""
        for table, first in zip(self._tables, self._state.first, strict=True):
            table.assign(np.broadcast_to(first, table.shape))
        self._has_begun.assign(0)

    def begin(self, step: Tensor) -> Tensor:
        """Begins a round.

        Args:
            step: The updates that the model's optimizers have counted, scalar int64.

        Returns:
            Those that they had counted when the training began.
        """
        has_begun = tf.convert_to_tensor(self._has_begun) > 0
        first = tf.where(has_begun, tf.convert_to_tensor(self._first_step), step)
        self._first_step.assign(first)
        self._has_begun.assign(1)
        return first

    def read(self, slot: Tensor) -> list[Tensor]:
        """Returns the values of `LocalState.of_optimizers` that a client has kept.

        Args:
            slot: The client's row, scalar int64.
        """
        return [tf.convert_to_tensor(table)[slot] for table in self._tables]

    def write(self, slot: Tensor, values: Sequence[Tensor]) -> None:
        """Keeps the values of a client.

        Args:
            slot: The client's row, scalar int64.
            values: Of `LocalState.of_optimizers`.
        """
        for table, value in zip(self._tables, values, strict=True):
            if not value.dtype.is_floating:  # counts; GPUs cannot write a row of each type
                is_row = tf.equal(tf.range(table.shape[0], dtype=tf.int64), slot)
                is_row = tf.reshape(is_row, [-1] + [1] * value.shape.rank)
                table.assign(tf.where(is_row, value, tf.convert_to_tensor(table)))
                continue
            # Only one row is written: a table may have thousands.
            tf.raw_ops.ResourceScatterUpdate(
                resource=_keras.backing_variable(table).handle,
                indices=slot[None],
                updates=value[None],
            )
