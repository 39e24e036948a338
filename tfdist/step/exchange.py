"""What an extension may put around the reduction of gradients, compression for example."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from tfdist.step.state import AnyRole
from tfdist.strategies.base import Strategy

Tensor = Any
Sums = tuple[list[Tensor], list[Tensor]]
"""Reduced gradients, and what else was reduced with them."""


@dataclass(frozen=True)
class Contribution:
    """What a replica gives to one reduction.

    Attributes:
        gradients: The replica's parts of the gradients: their sum over replicas is the whole.
            Dense, or `tf.IndexedSlices`.
        others: Dense tensors that must be summed exactly.
        share: Scalar float32: the replica's part of the batch.
        variables: The `keras.Variable` of each gradient.
        loss_scales: By what the loss that a gradient comes from was multiplied, a scalar
            tensor each; None where it was not.
    """

    gradients: Sequence[Tensor]
    others: Sequence[Tensor]
    share: Tensor
    variables: Sequence[Any]
    loss_scales: Sequence[Tensor | None]


class Exchange(abc.ABC):
    """Changes what travels between replicas; but for `reduce` each method does nothing here.

    Attributes:
        acts_alone: Whether it changes the result of one replica, too.
        has_phases: Whether `next_phase` says several things.
    """

    acts_alone: ClassVar[bool] = False
    has_phases: ClassVar[bool] = False

    @property
    def state(self) -> Sequence[tuple[Any, AnyRole]]:
        """Its `keras.Variable`s, each with its role."""
        return ()

    def reset(self) -> None:  # noqa: B027
        """Brings its state to where a training begins."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Makes a context around a training."""
        return contextlib.nullcontext()

    def next_phase(self) -> Hashable:
        """Says which kind of step comes next; each kind is traced once."""
        return None

    def end_step(self) -> None:  # noqa: B027
        """Called when a step was made."""

    def finish(self, counts: Tensor) -> None:  # noqa: B027
        """Called once on each replica, after all reductions of a step.

        Args:
            counts: Scalar bool: whether the step counts.
        """

    @abc.abstractmethod
    def reduce(
        self, strategy: Strategy, given: Contribution, phase: Hashable
    ) -> tuple[Sums, Callable[[Tensor], None]]:
        """Sums what replicas contribute.

        Args:
            strategy: Does the collectives.
            given: Of this replica.
            phase: What `next_phase` gave.

        Returns:
            The sums; and what keeps the state that the step leaves behind, given a scalar bool
            tensor: whether the step counts.
        """


class ExchangeMaker(Protocol):
    """Says what is put around the reduction; two that are equal make the same."""

    def make(self, model: Any, strategy: Strategy) -> Exchange:
        """Makes it for a model.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: Where its replicas are.
        """
