"""The exchange: an extension's wrapper around the reduction of gradients."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from tfdist.step.state import AnyRole, Sharded
from tfdist.strategies.base import Strategy

Tensor = Any
Sums = tuple[list[Tensor], list[Tensor]]
"""Reduced gradients, and the other tensors that were reduced with them."""


@dataclass(frozen=True)
class Contribution:
    """A replica's part of one reduction.

    Attributes:
        gradients: The replica's parts of the gradients, whose sum over all replicas is the
            gradient of the global batch. Dense tensors, or `tf.IndexedSlices`.
        others: Dense tensors that must be summed exactly.
        share: Scalar float32: the replica's part of the batch.
        variables: The `keras.Variable` of each gradient.
        loss_scales: The factor of loss scaling in each gradient, a scalar tensor, or None.
        are_rows: Whether each gradient has the values of some rows, the same on all replicas.
        is_applied: Whether optimizers apply the sums as they are.
    """

    gradients: Sequence[Tensor]
    others: Sequence[Tensor]
    share: Tensor
    variables: Sequence[Any]
    loss_scales: Sequence[Tensor | None]
    are_rows: Sequence[bool] = ()
    is_applied: bool = True


class Exchange(abc.ABC):
    """Changes what replicas send each other. By default, each method but `reduce` does nothing.

    Attributes:
        acts_alone: Whether it also changes the result of a single replica.
        has_phases: Whether `next_phase` has several values.
    """

    acts_alone: ClassVar[bool] = False
    has_phases: ClassVar[bool] = False

    @property
    def state(self) -> Sequence[tuple[Any, AnyRole]]:
        """The `keras.Variable`s of the exchange, each with its role."""
        return ()

    @property
    def parts(self) -> Sequence[tuple[Any, Sharded]]:
        """The model's `keras.Variable`s that it keeps in parts while training."""
        return ()

    @property
    def arrangement(self) -> Hashable:
        """How the model's variables are stored now. Functions are traced once for each way."""
        return None

    def reset(self) -> None:  # noqa: B027
        """Resets its state, at the beginning of a training."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context around a training."""
        return contextlib.nullcontext()

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context around a training, but not around an evaluation."""
        return contextlib.nullcontext()

    def next_phase(self) -> Hashable:
        """Returns the kind of the next step. Each kind is traced once."""
        return None

    def end_step(self) -> None:  # noqa: B027
        """Called after each step."""

    def finish(self, counts: Tensor) -> None:  # noqa: B027
        """Called once on each replica, after all reductions of a step.

        Args:
            counts: Scalar bool: whether the step counts.
        """

    @abc.abstractmethod
    def reduce(
        self, strategy: Strategy, contribution: Contribution, phase: Hashable
    ) -> tuple[Sums, Callable[[Tensor], None]]:
        """Sums the replicas' contributions.

        Args:
            strategy: Its collectives do the sums.
            contribution: The contribution of this replica.
            phase: The result of `next_phase`.

        Returns:
            The sums, and a function that stores the exchange's new state. Its argument is a
            scalar bool tensor: whether the step counts.
        """


class ExchangeMaker(Protocol):
    """Makes an exchange. Two makers that are equal make equal exchanges."""

    def make(self, model: Any, strategy: Strategy) -> Exchange:
        """Makes the exchange of a model.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: The strategy on whose replicas it trains.
        """
