"""The interface of rounds: several local steps between two reductions, in place of one step."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from tfdist.step.exchange import Exchange
from tfdist.step.signals import Signals
from tfdist.step.state import AnyRole
from tfdist.strategies.base import Strategy

Tensor = Any


class OwnRound(Protocol):
    """What an extension does in a step of Keras's loop, for one model on one strategy."""

    @property
    def state(self) -> Sequence[tuple[Any, AnyRole]]:
        """The `keras.Variable`s of the extension, each with its role."""

    @property
    def optimizers(self) -> Sequence[Any]:
        """The optimizers that own some of these variables."""

    def reset(self) -> None:
        """Resets its state, at the beginning of a training."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context around a training."""

    def train(
        self, share: Any, stopping: Tensor, phase: Hashable
    ) -> tuple[dict[str, Tensor], Signals]:
        """Trains on a replica, and brings all replicas to the same weights.

        Args:
            share: The element of the data source for this replica.
            stopping: The result of `StopState.requests`.
            phase: The result of `Exchange.next_phase`, if there is an exchange.

        Returns:
            The logs, and the signals that the workers have exchanged.
        """


class RoundMaker(Protocol):
    """Makes rounds. Two makers that are equal make equal rounds."""

    def make(self, model: Any, strategy: Strategy, exchange: Exchange | None) -> OwnRound:
        """Makes the rounds of a model.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: The strategy on whose replicas it trains.
            exchange: Another extension's wrapper of the reduction, or None.
        """
