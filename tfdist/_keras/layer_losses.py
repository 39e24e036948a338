"""The losses that layers add, separate for each replica.

The replicas of a process are traced in threads that take turns at collectives. A layer has one
list of losses, which the threads would mix and clear for each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from tfdist._keras.replica import current_batch


@contextlib.contextmanager
def losses_by_replica() -> Iterator[None]:
    """Gives each replica its own losses of a layer while the context lasts.

    Relies on `Layer._losses`, an attribute of the instance.
    """
    keras.Layer._losses = property(_losses, _set_losses)
    try:
        yield
    finally:
        del keras.Layer._losses


def _losses(layer: Any) -> list[Any]:
    batch = current_batch()
    if batch is None:
        # Keras asks for the attribute before it exists, if a layer is made during training.
        if "_losses" not in vars(layer):
            raise AttributeError("_losses")
        losses: list[Any] = vars(layer)["_losses"]
        return losses
    return batch.losses.setdefault(id(layer), [])


def _set_losses(layer: Any, losses: list[Any]) -> None:
    vars(layer)["_losses"] = losses
