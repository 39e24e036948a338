"""The interface of a train step that replaces Keras's, such as that of private training."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from tfdist._keras import ReplicaBatch
from tfdist.strategies.base import Strategy

Tensor = Any


class OwnStep(Protocol):
    """An extension's train step, for one model on one strategy."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context in which the step is traced and run."""

    def refuse_other_data(self) -> None:
        """Called if a callback trains the model by Keras's step. May raise an error."""

    def begin(self, share: Any) -> None:
        """Called before the replicas of this process make a step.

        Args:
            share: The share of each of them.
        """

    def end(self, is_made: Tensor) -> None:
        """Called after the replicas of this process have made a step.

        Args:
            is_made: Scalar bool: whether the step has changed anything.
        """

    def begin_step(
        self, data: Any, batch: ReplicaBatch, stopping: Tensor
    ) -> tuple[Any, Tensor]:
        """Called on a replica before it computes.

        Args:
            data: The replica's rows: `x`, `(x, y)` or `(x, y, sample_weight)`.
            batch: The position of these rows in the global batch.
            stopping: The result of `StopState.requests`.

        Returns:
            The rows and `stopping`; the step may change both.
        """

    def train_step(self, data: Any, batch: ReplicaBatch, groups: Tensor) -> Any:
        """Computes the replica's part of the update, and of the metrics.

        Args:
            data: As in `begin_step`.
            batch: As in `begin_step`.
            groups: Int64 [rows]: the group of each row, if rows have groups.

        Returns:
            The logs of the step.
        """


class StepMaker(Protocol):
    """Makes a step. Two makers that are equal make equal steps."""

    def make(self, model: Any, strategy: Strategy) -> OwnStep:
        """Makes the step of a model.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: The strategy on whose replicas it trains.
        """
