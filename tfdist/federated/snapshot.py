"""The model as it was before a round, for a round that fails."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tfdist.step.state import variables_of


class RoundSnapshot(keras.callbacks.Callback):  # type: ignore[misc]
    """Copies the model and its optimizer before each round.

    Local steps assign the weights of a client to the model. If a round ends by an error, these
    would stay there: what one client has learned, without an average, a mask or noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: list[tuple[Any, Any]] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Copies the values. A round is a batch of Keras's loop."""
        self._values = [
            (variable, np.array(keras.ops.convert_to_numpy(variable)))
            for variable in variables_of(self.model)
        ]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Drops the copies: the round has ended."""
        self._values = []

    def restore(self) -> None:
        """Assigns the copies, if a round has begun and not ended."""
        for variable, value in self._values:
            variable.assign(value)
        self._values = []
