"""The settings of a server on Flower."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tfdist.errors import ArgumentError
from tfdist.federated.flower.messages import TAKEN
from tfdist.federated.settings import FedAvg, check
from tfdist.training import preflight


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The arguments of `tfdist.flower.server_app`, with the same meaning.

    Raises:
        ArgumentError: An argument is not valid, or is not there on Flower.
    """

    federated: FedAvg
    rounds: int
    batch_size: int
    num_clients: int
    lost: str
    timeout: float
    shuffle: bool
    seed: int | None
    callbacks: Any
    validation_data: Any
    verbose: Any
    has_checkpoint: bool

    def __post_init__(self) -> None:
        settings = check(self.federated)
        preflight.check_counts(rounds=self.rounds, num_clients=self.num_clients)
        is_time = isinstance(self.timeout, int | float) and 0 < self.timeout < float("inf")
        if not is_time:
            raise ArgumentError(
                f"`timeout` must be a number of seconds above 0. Received: "
                f"timeout={self.timeout!r}."
            )
        if self.lost not in ("repeat", "skip"):
            raise ArgumentError(
                "`lost` must be 'repeat', to ask clients again that do not answer, or 'skip', "
                f"to make a round without them. Received: lost={self.lost!r}."
            )
        if settings.clients is not None:
            raise ArgumentError(
                "On Flower, each node is a client. Received: FedAvg(clients=...). Leave "
                "`clients` out; `data_fn` returns a node's rows."
            )
        for field in dataclasses.fields(FedAvg):
            is_set = getattr(settings, field.name) is not field.default
            if is_set and field.name not in (*TAKEN, "server_optimizer"):
                raise ArgumentError(
                    f"On Flower, `FedAvg` is used without `{field.name}`. Received: "
                    f"{field.name}={getattr(settings, field.name)!r}. Use tfdist.fit for it."
                )
        if settings.keep_optimizer and self.has_checkpoint:
            raise ArgumentError(
                "On Flower, what clients keep belongs to one run, so another run cannot go on "
                "with it. Received: keep_optimizer=True and a checkpoint. Leave one of them "
                "out."
            )
