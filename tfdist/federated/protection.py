"""The interfaces of what protects whole clients, or single examples by each client alone.

`tfdist.ClientDP` is of the first kind, and `tfdist.DPSGD` of the second.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tfdist.samplers import Sampler
from tfdist.step.state import AnyRole
from tfdist.strategies.base import Strategy

Tensor = Any


class ClientProtection(abc.ABC):
    """The settings of a protection: the argument `privacy` of `FedAvg`.

    Attributes:
        sampling_probability: The probability with which a round draws each client,
            independently of the others.
        max_examples: The number of rows from which on a client has the full weight, for
            weighting="examples". None with weighting="uniform".
    """

    sampling_probability: float
    max_examples: int | None

    @property
    def turns(self) -> int:
        """The number of groups of clients that take turns, each in a round."""
        return 1


class ExampleProtection:
    """The settings of a protection of examples, which each client applies to its own ones."""


class LocalStep(Protocol):
    """A private local step, which replaces Keras's `train_step`."""

    def of_client(
        self, client: Tensor, index: Tensor, pull: Callable[[Any], Tensor | None]
    ) -> LocalStep:
        """Returns the step for one client.

        Args:
            client: The number of the client, scalar int64.
            index: The number of its local step in the round, scalar int64.
            pull: Returns what is added to the gradient of a `keras.Variable`, or None.
        """

    def begin_step(self, data: Any, batch: Any, stopping: Tensor) -> tuple[Any, Tensor]:
        """Prepares the rows; see `OwnStep`."""

    def train_step(self, data: Any, batch: Any, groups: Tensor) -> Any:
        """Makes the step, and returns its logs; see `OwnStep`."""

    def requests(self, stopping: Tensor) -> Tensor:
        """Returns `stopping`, which asks all workers to stop if a step must not count."""


class LocalProtection(Protocol):
    """How each client protects its examples, in one training.

    Attributes:
        sampler: Draws the rows of a client's local steps.
        row_seed: The seed of these draws. It is secret, and each worker has its own.
    """

    sampler: Sampler
    row_seed: int

    def step_of(self, model: Any, strategy: Strategy) -> LocalStep:
        """Returns the step of a model, after the extension was bound.

        Args:
            model: A compiled, built `keras.Model`.
            strategy: The strategy on whose replicas it trains.
        """


class UpdateMechanism(Protocol):
    """What a protection does to the updates of clients, in one training."""

    @property
    def sends_whole_numbers(self) -> bool:
        """Whether the result of `release` consists of whole numbers."""

    @property
    def is_correlated(self) -> bool:
        """Whether later rounds subtract noise, which is added to the sum of all replicas."""

    @property
    def num_votes(self) -> int:
        """How many numbers of a client `clip` appends to its update."""

    @property
    def state(self) -> Sequence[tuple[Any, AnyRole]]:
        """What a round changes, besides the model."""

    def reset(self) -> None:
        """Sets its state to that of a new training."""

    def logs(self) -> dict[str, Tensor]:
        """Returns values for the logs of the present round."""

    def clip(self, update: Sequence[Tensor]) -> list[Tensor]:
        """Bounds what one client contributes.

        Args:
            update: The client's update of each variable.

        Returns:
            The bounded update, and `num_votes` numbers.
        """

    def release(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Returns what a replica sends of the sum of its clients' updates.

        Args:
            sums: Of what `clip` returned.
        """

    def mean(self, total: Sequence[Tensor]) -> list[Tensor]:
        """Returns the update of the server's model, and the means of the votes.

        Args:
            total: The sum over all replicas of what they have sent.
        """

    def follow(self, votes: Sequence[Tensor], choose: Callable[..., Tensor]) -> None:
        """Changes its state after a round.

        Args:
            votes: Their means.
            choose: Chooses the first value if the round counts, else the second.
        """


class Protecting(Protocol):
    """An extension of `fit` that protects clients, or their examples."""

    @property
    def mechanism(self) -> UpdateMechanism | None:
        """What is done to updates, or None. It is there when the extension was bound."""

    @property
    def local(self) -> LocalProtection | None:
        """What each client does in its local steps, or None."""
