"""The position of a training, and callbacks that continue from it.

Checkpoints and elastic runs share both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from tfdist.data.epochs import DataPosition


class Position(NamedTuple):
    """The position of a training.

    Attributes:
        epoch: The epoch, as Keras counts.
        step: Number of completed steps of the epoch.
        data: The position of the data at the beginning of the epoch.
    """

    epoch: int
    step: int
    data: DataPosition

    def to_json(self) -> list[Any]:
        """Returns the position as a list for JSON."""
        return [self.epoch, self.step, list(self.data)]

    @classmethod
    def from_json(cls, values: list[Any]) -> Position:
        """Makes a position from the list of `to_json`.

        Args:
            values: The list.
        """
        epoch, step, data_position = values
        return cls(epoch, step, DataPosition(*data_position))


class ContinuedCallbacks(keras.callbacks.CallbackList):  # type: ignore[misc]
    """Callbacks that are not called for the steps that an earlier attempt has completed.

    Keras's loop iterates over all steps of an epoch, so that its count is right. The train
    function runs only the remaining steps.

    Attributes:
        steps_made: Number of steps of the first epoch that are completed already.
    """

    callbacks: list[Any]
    steps_made = 0

    def is_completed(self, first: int) -> bool:
        """Returns whether the steps of one execution are completed already.

        Args:
            first: Index of the first of these steps in the epoch.
        """
        stop = first + int(self.model.steps_per_execution)
        steps = self.params.get("steps")
        # The last execution of an epoch may have fewer steps than the others.
        return stop <= self.steps_made or (steps is not None and steps <= self.steps_made)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Calls the callbacks before steps."""
        if not self.is_completed(batch):
            super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Calls the callbacks after steps."""
        if not self.is_completed(batch + 1 - int(self.model.steps_per_execution)):
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Calls the callbacks after an epoch."""
        self.steps_made = 0
        super().on_epoch_end(epoch, logs)
