"""The interface of what protects whole clients. `tfdist.ClientDP` is the only kind there is."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Protocol

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

    def clip(self, update: Sequence[Tensor]) -> list[Tensor]:
        """Bounds what one client contributes.

        Args:
            update: The client's update of each variable.
        """

    def release(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Returns what a replica sends of the sum of its clients' updates.

        Args:
            sums: Of bounded updates.
        """

    def mean(self, total: Sequence[Tensor]) -> list[Tensor]:
        """Returns the update of the server's model.

        Args:
            total: The sum over all replicas of what they have sent.
        """


class Protecting(Protocol):
    """An extension of `fit` that protects clients."""

    @property
    def mechanism(self) -> UpdateMechanism:
        """The mechanism. It is there when the extension was bound."""
