"""The interface of what protects whole clients. `tfdist.ClientDP` is the only kind there is."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tfdist.step.state import AnyRole

Tensor = Any


class ClientProtection(abc.ABC):
    """The settings of a protection: the argument `privacy` of `FedAvg`.

    Attributes:
        sampling_probability: The probability with which a round draws each client,
            independently of the others.
    """

    sampling_probability: float


class UpdateMechanism(Protocol):
    """What a protection does to the updates of clients, in one training."""

    @property
    def sends_whole_numbers(self) -> bool:
        """Whether the result of `release` consists of whole numbers."""

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
    """An extension of `fit` that protects clients."""

    @property
    def mechanism(self) -> UpdateMechanism:
        """The mechanism. It is there when the extension was bound."""
