"""What may take the place of Keras's train step, private training's for example."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from tfdist._keras import ReplicaBatch
from tfdist.strategies.base import Strategy

Tensor = Any


class OwnStep(Protocol):
    """A train step of an extension's own, on one model and one strategy."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context in which the step is traced and made."""

    def begin(self, share: Any) -> None:
        """Called before all replicas of this process make a step.

        Args:
            share: What is dealt out to them.
        """

    def end(self, is_made: Tensor) -> None:
        """Called when they have made it.

        Args:
            is_made: Scalar bool: whether it has changed anything.
        """

    def begin_step(
        self, data: Any, batch: ReplicaBatch, stopping: Tensor
    ) -> tuple[Any, Tensor]:
        """Called on a replica before it computes.

        Args:
            data: The replica's rows: `x`, `(x, y)` or `(x, y, sample_weight)`.
            batch: What the replica knows of them.
            stopping: As `Stop.asked` gives it.

        Returns:
            The rows and `stopping`, both perhaps changed.
        """

    def train_step(self, data: Any, batch: ReplicaBatch, groups: Tensor) -> Any:
        """Computes the replica's part of the update, and of the metrics.

        Args:
            data: As in `begin_step`.
            batch: As in `begin_step`.
            groups: Int64 [rows]: the group of each row, where rows have groups.

        Returns:
            Logs.
        """


class StepMaker(Protocol):
    """Says which step a training makes; two that are equal make the same."""

    def make(self, model: Any, strategy: Strategy) -> OwnStep:
        """Makes the step of a model.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: Where its replicas are.
        """
