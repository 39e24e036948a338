"""Sampling of users, each with all of its examples up to a limit."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_count
from tfdist.privacy.accounting.ledger import USER, Phase
from tfdist.privacy.sampling.poisson import Accounted, Poisson
from tfdist.samplers import Rows, Sampler
from tfdist.samplers.permutation import generator


class Users:
    """The users of rows.

    Args:
        group_ids: The name or number of each row's user, shape [rows].
        limit: The most rows of a user in a step. None is no limit.

    Attributes:
        group_of: The number of each row's user, int64 of shape [rows].
        count: The number of users.
        limit: The most rows of a user in a step.
        rows_within_limit: The number of rows of all users, with at most `limit` of each.

    Raises:
        ArgumentError: `group_ids` does not have one name or number for each row.
    """

    def __init__(self, group_ids: Any, limit: int | None = None) -> None:
        ids = np.asarray(group_ids)
        if ids.ndim == 1 and ids.dtype == object:
            _check_types(ids)
            ids = np.array([str(i) for i in ids])
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iubUSM":
            raise ArgumentError(
                "`group_ids` must have a whole number or a name for each example. Received: "
                f"group_ids of shape {ids.shape} and dtype {ids.dtype}. Pass a list, or an "
                "array of one dimension."
            )
        if limit is not None:
            check_count("max_rows_per_group", limit, 1)
        names, numbers, counts = np.unique(ids, return_inverse=True, return_counts=True)
        self.group_of = numbers.reshape(-1).astype(np.int64)
        self.count = len(names)
        self._order = np.argsort(self.group_of, kind="stable").astype(np.int64)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self.limit = int(counts.max()) if limit is None else min(limit, int(counts.max()))
        self.rows_within_limit = int(np.minimum(counts, self.limit).sum())

    def rows(self, users: NDArray[np.int64], random: np.random.RandomState) -> Rows:
        """Returns the rows of some users, with a new random choice of at most `limit` each.

        Args:
            users: The numbers of the users.
            random: The random generator of the choice.
        """
        parts = []
        for user in users:
            rows = self._order[self._first[user] : self._first[user + 1]]
            if len(rows) > self.limit:
                # A random choice, as a fixed one would never train on the other rows.
                rows = np.sort(random.permutation(rows)[: self.limit])
            parts.append(rows)
        return np.concatenate([np.zeros(0, np.int64), *parts])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the users of all rows."""
        return hashlib.sha256(self.group_of.tobytes()).hexdigest()[:12]


def _check_types(ids: Any) -> None:
    """Refuses ids of several types: 1, 1.0 and "1" may mean one user, and would be three."""
    numbers = (int, np.integer)  # a bool is also an int, but its name is another
    kinds = {int if isinstance(i, numbers) and type(i) is not bool else type(i) for i in ids}
    missing = any(issubclass(kind, float | type(None)) for kind in kinds)  # NaN is a float
    if len(kinds) > 1 or missing:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ArgumentError(
            "`group_ids` must be all names or all whole numbers, and none may be missing: 1 "
            f"and '1' would be two users. Received: values of type {names}. Make them one type."
        )


@dataclass(frozen=True, eq=False)
class PoissonOfUsers(Accounted):
    """Draws each user into each step independently, with its rows up to the limit.

    The probability is `batch_size` over the number of rows of all users, up to the limit of
    each, so a step has `batch_size` rows on average.

    Args:
        users: The users of the rows.
        poisson: The sampler of users. Its capacity is a number of users.
    """

    users: Users
    poisson: Poisson

    @property
    def group_of(self) -> Rows:
        """The number of each row's user. Rows of a user stay together on a replica."""
        return self.users.group_of

    def bind(self, targets: Any, num_rows: int) -> Sampler:
        """Compares the number of rows; see `Sampler.bind`."""
        if num_rows != len(self.users.group_of):
            raise ArgumentError(
                "`group_ids` must have one number or name for each example. Received: "
                f"{len(self.users.group_of)} group_ids and {num_rows} examples. Pass as many "
                "as there are rows in `x`."
            )
        poisson = self.poisson.bind(targets, self.users.count)
        assert isinstance(poisson, Poisson)
        return PoissonOfUsers(self.users, poisson)

    def steps_per_epoch(self, num_rows: int, batch_size: int) -> int:
        """Returns the number of steps that draw each user once on average."""
        return -(-self.users.rows_within_limit // batch_size)

    def phase(
        self, *, num_rows: int, batch_size: int, steps: int, noise_multiplier: float
    ) -> Phase:
        """Describes steps of this sampler to the accountant; see `Accounted.phase`."""
        return Phase(
            self._probability(batch_size),
            noise_multiplier,
            steps,
            self.poisson.capacity_for(self.users.count, self._expected(batch_size)),
            self.users.count,
            USER,
        )

    def expected_rows(self, num_rows: int, batch_size: int) -> float:
        """Returns how many rows a step has on average."""
        return self._probability(batch_size) * self.users.rows_within_limit

    def expected_units(self, num_rows: int, batch_size: int) -> float:
        """Returns how many users a step has on average."""
        return self._expected(batch_size)

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Rows:
        """Returns the rows of one global batch, user by user, possibly none."""
        users = self.poisson.rows(
            step,
            num_rows=self.users.count,
            batch_size=self._expected(batch_size),
            seed=seed,
        )
        return self.users.rows(users, generator((seed, step, *b"rows")))

    def _probability(self, batch_size: int) -> float:
        return min(1.0, batch_size / self.users.rows_within_limit)

    def _expected(self, batch_size: int) -> float:
        return self._probability(batch_size) * self.users.count
