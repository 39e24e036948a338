"""The plan of a round: its clients, their weights and steps, and the replica of each.

A plan is a function of the seed and the number of the round, so all workers make the same one,
and a training that is continued makes the plans of the first one.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tfdist.federated.clients import ANYWHERE, Clients
from tfdist.federated.settings import FedAvg
from tfdist.samplers import Rows, Sampler, permute
from tfdist.samplers.permutation import generator
from tfdist.strategies.base import Place

_DRAWING = 0xD4A3
_STREAMS = 0x57E4
_TURNS = 0x7042


@dataclass(frozen=True)
class Round:
    """A round of all replicas.

    Attributes:
        clients: The clients in ascending order, shape [n].
        steps: Local steps of each, shape [n].
        first_steps: Local steps that each has made in earlier rounds, shape [n].
        weights: The weight of each in the average, shape [n]. They add up to 1, unless whole
            clients are protected: then each is at most 1.
        replicas: The replica on which each trains, shape [n].
    """

    clients: Rows
    steps: Rows
    first_steps: Rows
    weights: NDArray[np.float64]
    replicas: Rows

    @property
    def check(self) -> NDArray[np.float32]:
        """Four whole numbers below 64 that differ if rounds differ."""
        parts = (self.clients, self.steps, self.first_steps, self.weights, self.replicas)
        digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()
        return (np.frombuffer(digest[:4], np.uint8) % 64).astype(np.float32)


class OfReplica(NamedTuple):
    """What one replica does in a round: arrays in a plan, tensors in a step.

    Attributes:
        rows: The rows of each local step, padded, int64 of shape [steps, most rows].
        counts: Rows of each local step, int64 of shape [steps].
        clients: The clients in the order in which they train, int64 of shape [n].
        steps: Local steps of each, int64 of shape [n].
        weights: The weight of each, float64 of shape [n].
        slots: The place of each among the clients whose optimizers this replica keeps, int64
            of shape [n].
        streams: The number of each client's random numbers, int64 of shape [n].
        held: Rows that the replica's clients hold, and those of all clients of the round,
            int64 of shape [2].
        longest: The most local steps of a client of the round, on any replica, scalar int64.
        number: The number of the round, scalar int64.
        check: See `Round.check`, float32 of shape [4].
    """

    rows: Any
    counts: Any
    clients: Any
    steps: Any
    weights: Any
    slots: Any
    streams: Any
    held: Any
    longest: Any
    number: Any
    check: Any


class RoundPlan:
    """Plans rounds.

    Args:
        settings: The settings.
        clients: The clients.
        place: The replicas.
        sampler: Chooses the rows of a client's local steps.
        batch_size: Rows of a local step.
        seed: The seed of the training.
        row_seed: The seed of the rows of local steps; that of the training if None. If clients
            protect their examples, it is secret, and each worker has its own.

    Attributes:
        clients: The clients.
        batch_size: Rows of a local step.
        full_batch: Rows of each local step, if all have the same number and no client is
            protected, else None.
        may_be_empty: Whether a local step may have no rows.
        slots_per_replica: The most clients whose optimizers one replica keeps.
        num_slots: Number of all slots that may be used.
        longest: The most local steps that any client makes in a round.
        turn_of: The group of each client, if clients take turns; else 0.
    """

    def __init__(
        self,
        settings: FedAvg,
        clients: Clients,
        place: Place,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        row_seed: int | None = None,
    ) -> None:
        self._row_seed = seed if row_seed is None else row_seed
        self._settings = settings
        self.clients = clients
        self.batch_size = batch_size
        self._place = place
        self._sampler = sampler
        self._seed = seed
        self._eligible = np.flatnonzero(clients.sizes)
        passes = [int(n) and sampler.steps_per_epoch(int(n), batch_size) for n in clients.sizes]
        self._steps = np.array([settings.steps_of(steps) for steps in passes], np.int64)
        self.longest = int(self._steps.max())
        self.may_be_empty = sampler.may_be_empty
        # A static size would tell a protected client how many rows the others have.
        is_whole = not (clients.sizes % batch_size).any() and not sampler.may_be_empty
        is_full = is_whole and settings.privacy is None
        self.full_batch = batch_size if is_full else None
        self._homes, self._slots = self._keep()
        self.slots_per_replica = int(self._slots.max()) + 1
        is_contiguous = (clients.workers == ANYWHERE).all()
        padded = place.num_replicas * self.slots_per_replica
        self.num_slots = clients.number if is_contiguous else padded
        self.turn_of = self._take_turns()
        self._drawn = np.zeros(clients.number, np.int64)
        self._drawn_up_to = 0
        self._last: tuple[int, Round] | None = None

    def _take_turns(self) -> Rows:
        """Chooses the group of each client, once, whether or not it holds rows."""
        number, privacy = self.clients.number, self._settings.of_clients
        turns: Rows = np.zeros(number, np.int64)
        if privacy is not None and privacy.turns > 1:
            order = permute(np.arange(number), number, (self._seed, _TURNS))
            turns[order] = np.arange(number) % privacy.turns
        return turns

    def _keep(self) -> tuple[Rows, Rows]:
        """Chooses the replica that keeps a client's optimizer, and the place there."""
        clients, place = self.clients, self._place
        numbers = np.arange(clients.number)
        block = -(-clients.number // place.num_replicas)
        homes, slots = numbers // block, numbers % block
        for worker in np.unique(clients.workers[clients.workers != ANYWHERE]):
            own = np.flatnonzero(clients.workers == worker)
            local = np.arange(len(own))
            homes[own] = worker * place.local_replicas + local % place.local_replicas
            slots[own] = local // place.local_replicas
        return homes, slots

    def chosen(self, number: int) -> Rows:
        """Returns the clients of a round, in ascending order.

        Args:
            number: The number of the round.
        """
        privacy, wanted = self._settings.of_clients, self._settings.clients_per_round
        if privacy is not None and privacy.turns > 1:
            is_next = self.turn_of[self._eligible] == number % privacy.turns
            taking: Rows = self._eligible[is_next]
            return taking
        if privacy is not None:
            # Each client is drawn by itself: the accounting is of Poisson sampling.
            random = generator((self._seed, _DRAWING, number))
            drawn = random.random_sample(self.clients.number) < privacy.sampling_probability
            return self._eligible[drawn[self._eligible]]
        if wanted is None or self._takes_all:
            return self._eligible
        key = (self._seed, _DRAWING, number)
        return np.sort(self._eligible[permute(np.arange(wanted), len(self._eligible), key)])

    @property
    def _takes_all(self) -> bool:
        """Whether all clients that hold rows take part in each round."""
        privacy, wanted = self._settings.of_clients, self._settings.clients_per_round
        if privacy is not None:
            return privacy.sampling_probability == 1 and privacy.turns == 1
        return wanted is None or wanted >= len(self._eligible)

    def round(self, number: int) -> Round:
        """Returns a round.

        Args:
            number: The number of the round.
        """
        if self._last is None or self._last[0] != number:
            self._last = number, self._make(number)
        return self._last[1]

    def _make(self, number: int) -> Round:
        clients = self.chosen(number)
        steps = self._steps[clients]
        first_steps = self._rounds_made(number)[clients] * steps
        parts = np.ones(len(clients))
        if self._settings.weighting == "examples":
            parts = self.clients.sizes[clients].astype(np.float64)
        weights = parts / max(1.0, parts.sum())
        if self._settings.of_clients is not None:
            # The divisor is fixed: neither it nor a weight may depend on other clients.
            most = self._settings.of_clients.max_examples or 1
            weights = np.minimum(parts, most) / most
        replicas = self._homes[clients] if self._is_fixed else self._deal(clients, steps)
        return Round(clients, steps, first_steps, weights, replicas)

    @property
    def _is_fixed(self) -> bool:
        """Whether a client always trains on the same replica."""
        return self._settings.keep_optimizer or self.clients.kind != "id"

    def _rounds_made(self, number: int) -> Rows:
        """Counts each client's earlier rounds."""
        if self._takes_all:
            return np.full(self.clients.number, number)
        if number < self._drawn_up_to:
            self._drawn, self._drawn_up_to = np.zeros_like(self._drawn), 0
        for earlier in range(self._drawn_up_to, number):
            self._drawn[self.chosen(earlier)] += 1
        self._drawn_up_to = number
        return self._drawn.copy()

    def _deal(self, clients: Rows, steps: Rows) -> Rows:
        """Gives each client to the replica with the fewest steps, long clients first."""
        place = self._place
        replicas = np.zeros(len(clients), np.int64)
        workers = self.clients.workers[clients]
        for worker in np.unique(workers):
            everywhere = range(place.num_replicas)
            first = int(worker) * place.local_replicas
            local = (
                everywhere if worker == ANYWHERE else range(first, first + place.local_replicas)
            )
            loads = [(0, replica) for replica in local]
            own = np.flatnonzero(workers == worker)
            for i in own[np.argsort(-steps[own], kind="stable")]:
                load, replica = loads[0]
                heapq.heapreplace(loads, (load + int(steps[i]), replica))
                replicas[i] = replica
        return replicas

    def of_replica(self, number: int, replica: int) -> OfReplica:
        """Returns what a replica of this process does in a round.

        Args:
            number: The number of the round.
            replica: The replica's global number.
        """
        planned = self.round(number)
        own = np.flatnonzero(planned.replicas == replica)
        batches: list[Rows] = []
        for i in own:
            batches += self._batches(
                int(planned.clients[i]), int(planned.first_steps[i]), int(planned.steps[i])
            )
        clients = planned.clients[own]
        held = [self.clients.sizes[clients].sum(), self.clients.sizes[planned.clients].sum()]
        longest = planned.steps.max(initial=0)
        if self._settings.privacy is not None:
            longest = np.int64(self.longest)  # it must not show who was drawn
        return OfReplica(
            _padded(batches),
            np.array([len(batch) for batch in batches], np.int64),
            clients,
            planned.steps[own],
            planned.weights[own],
            self._slots[clients],
            self._streams(number, clients),
            np.array(held, np.int64),
            longest,
            np.int64(number),
            planned.check,
        )

    def _streams(self, number: int, clients: Rows) -> Rows:
        if self._settings.privacy is None:
            return clients
        # The number of a client depends on which others there are, and nothing that others
        # contribute may. So these numbers come from the secret seed.
        keys = [(self._seed, _STREAMS, number, int(client)) for client in clients]
        words = [np.random.SeedSequence(key).generate_state(1)[0] for key in keys]
        return np.array(words, np.int64)

    def _batches(self, client: int, first: int, count: int) -> list[Rows]:
        members = self.clients.members[client]
        # The first client has the seed of the training: alone, it draws what `fit` draws.
        words = np.random.SeedSequence((self._row_seed, client)).generate_state(1, np.uint64)
        alike = not client and self._settings.of_clients is None
        seed = self._row_seed if alike else int(words[0] >> 1)
        batches = self._sampler.batches(
            first, count, num_rows=len(members), batch_size=self.batch_size, seed=seed
        )
        return [members[batch] for batch in batches]


def _padded(batches: Sequence[Rows]) -> Rows:
    rows = np.zeros((len(batches), max([1, *map(len, batches)])), np.int64)
    for row, batch in zip(rows, batches, strict=True):
        row[: len(batch)] = batch
    return rows
