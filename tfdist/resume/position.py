"""What a training that goes on has in common, after a restart or among other processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from tfdist.data.epochs import DataPosition


class Position(NamedTuple):
    """Where training stands.

    Attributes:
        epoch: As Keras counts.
        step: Steps made of it.
        data: Where the data stood when the epoch began.
    """

    epoch: int
    step: int
    data: DataPosition

    def to_json(self) -> list[Any]:
        """Gives what JSON can hold."""
        return [self.epoch, self.step, list(self.data)]

    @classmethod
    def from_json(cls, written: list[Any]) -> Position:
        """Reads what `to_json` gave.

        Args:
            written: The list.
        """
        epoch, step, where = written
        return cls(epoch, step, DataPosition(*where))


class ContinuedCallbacks(keras.callbacks.CallbackList):  # type: ignore[misc]
    """Callbacks that hear nothing of the steps that were made already.

    Keras's loop goes over all steps of an epoch, so that it counts them as ever; the train
    function makes those that are left.

    Attributes:
        made: Steps of the first epoch that were made already.
    """

    callbacks: list[Any]
    made = 0

    def is_made(self, first: int) -> bool:
        """Tells whether the steps of one execution were made already.

        Args:
            first: Of these steps, in the epoch.
        """
        stop = first + int(self.model.steps_per_execution)
        steps = self.params.get("steps")
        return stop <= self.made or (steps is not None and steps <= self.made)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Tells them that steps begin."""
        if not self.is_made(batch):
            super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Tells them that steps were made."""
        if not self.is_made(batch + 1 - int(self.model.steps_per_execution)):
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Tells them that an epoch has ended."""
        self.made = 0
        super().on_epoch_end(epoch, logs)
