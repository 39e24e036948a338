"""Who the clients are: the rows of each, and the worker that holds them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfdist.errors import ArgumentError
from tfdist.samplers import Rows, permute
from tfdist.strategies.base import Place, Strategy

ANYWHERE = -1
_DEALING = 0xDEA1


@dataclass(frozen=True)
class Clients:
    """The clients of a training, numbered in the order of their ids.

    Attributes:
        sizes: Rows of each client, int64 of shape [clients].
        workers: The worker that holds a client's rows, or `ANYWHERE`; shape [clients].
        members: The numbers of a client's rows in this process's data, by client. Clients of
            other workers are not in it.
        kind: What a client is: "replica", "worker" or "id".
    """

    sizes: Rows
    workers: Rows
    members: Mapping[int, Rows]
    kind: str

    @property
    def number(self) -> int:
        """Number of clients, with those that hold no rows."""
        return len(self.sizes)

    def describe(self) -> str:
        """Says how many clients there are, and how many rows they hold."""
        least, most = int(self.sizes.min()), int(self.sizes.max())
        rows = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        if self.number == 1:
            return f"1 client of {rows} rows"
        each = {"replica": ", one on each replica", "worker": ", one on each worker"}
        return f"{self.number:,} clients{each.get(self.kind, '')}, of {rows} rows"


def of_replicas(num_rows: int, place: Place, seed: int) -> Clients:
    """Deals all rows to the replicas, each of which is a client.

    Args:
        num_rows: Rows that every worker has.
        place: The replicas.
        seed: Chooses which replica gets which rows.
    """
    replicas = place.num_replicas
    if replicas == 1:
        members = {0: np.arange(num_rows)}
    else:
        local = range(place.first_replica, place.first_replica + place.local_replicas)
        members = {
            replica: permute(np.arange(replica, num_rows, replicas), num_rows, (seed, _DEALING))
            for replica in local
        }
    sizes = np.array([len(range(r, num_rows, replicas)) for r in range(replicas)], np.int64)
    return Clients(sizes, np.full(replicas, ANYWHERE), members, "replica")


def of_workers(rows_per_worker: list[int], worker: int) -> Clients:
    """Makes each worker a client.

    Args:
        rows_per_worker: Rows that each worker holds.
        worker: This worker.
    """
    sizes = np.array(rows_per_worker, np.int64)
    members = {worker: np.arange(sizes[worker])}
    return Clients(sizes, np.arange(len(sizes)), members, "worker")


def of_ids(ids: Any, num_rows: int, strategy: Strategy, is_local: bool) -> Clients | None:
    """Makes a client of all rows with the same id.

    All workers call it, also those without ids: what is wrong on one is told to all.

    Args:
        ids: The id of each row, shape [rows], or None.
        num_rows: Rows of this process's data.
        strategy: The strategy of the workers.
        is_local: Whether each worker has its own rows. Otherwise all have all rows.

    Returns:
        The clients, or None if no worker has ids.

    Raises:
        ArgumentError: The ids do not fit the rows, some workers have ids and others have none,
            two workers hold rows of one client, or the ids of one worker are whole numbers
            and those of another strings.
    """
    by_name, problem = None, None
    if ids is not None:
        ids = as_ids(ids)
        problem = _why_unfit(ids, num_rows)
        by_name = None if problem else _rows_by_name(ids)
    table = None
    if by_name is not None:  # ids stay where all workers have all rows
        table = [(n, len(r)) for n, r in by_name.items()] if is_local else []
    told = strategy.gather_objects((problem, table, bool(num_rows) or not is_local))
    if not _have_ids(told):
        return None
    by_name = by_name or {}
    if not is_local:
        counts = np.array([len(rows) for rows in by_name.values()], np.int64)
        members = dict(enumerate(by_name.values()))
        return Clients(counts, np.full(len(counts), ANYWHERE), members, "id")
    _check_kinds([table for _, table, _ in told])
    entries = [(n, w, size) for w, (_, table, _) in enumerate(told) for n, size in table or []]
    entries.sort()
    for (name, worker, _), (following, other, _) in itertools.pairwise(entries):
        if name == following:
            raise ArgumentError(
                "With `shard='local'` all rows of a client must be on one worker. Received: "
                f"rows of client {name!r} on workers {worker} and {other}. Give the client of "
                "each worker an id of its own."
            )
    members = {i: by_name[n] for i, (n, _, _) in enumerate(entries) if n in by_name}
    _, workers, sizes = zip(*entries, strict=True)
    return Clients(np.array(sizes, np.int64), np.array(workers), members, "id")


def as_ids(ids: Any) -> Any:
    """Returns ids as an array, of shape [] if they are none. That is refused on all workers.

    Args:
        ids: What the user passed.
    """
    try:
        return np.asarray(ids)
    except ValueError:  # lists of different lengths
        return np.asarray(None)


def _why_unfit(ids: Any, num_rows: int) -> str | None:
    """Returns what was received, if the ids do not fit the rows."""
    is_named = ids.dtype == object and all(isinstance(name, str) for name in ids.flat)
    fits = ids.ndim == 1 and len(ids) == num_rows
    if fits and (not len(ids) or is_named or ids.dtype.kind in "iuU"):
        return None
    return f"clients of shape {ids.shape} and dtype {ids.dtype}, for {num_rows} rows"


def _rows_by_name(ids: Any) -> dict[Any, Rows]:
    """Returns the numbers of the rows of each id, in the order of the ids."""
    if ids.dtype == object:
        ids = ids.astype(str)
    names, inverse = np.unique(ids, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    counts = np.bincount(inverse, minlength=len(names))
    rows = np.split(order, np.cumsum(counts)[:-1]) if len(names) else []
    return dict(zip(names.tolist(), rows, strict=True))


def _check_kinds(tables: list[Any]) -> None:
    """Refuses ids of two kinds: with 4 and "4", one client could be counted as two.

    Args:
        tables: The ids of each worker with their numbers of rows, or None.
    """
    kinds = [{type(name).__name__ for name, _ in table or []} for table in tables]
    if len(set().union(*kinds)) > 1:
        listed = (
            f"{kind} on worker {n}" for n, each in enumerate(kinds) for kind in sorted(each)
        )
        raise ArgumentError(
            "`clients` must be whole numbers on all workers, or strings on all. Received: "
            f"{', '.join(listed)}. Write the ids of all clients in the same way."
        )


def _have_ids(told: list[Any]) -> bool:
    """Returns whether the workers have ids. What is wrong on one is refused on all.

    Args:
        told: From each worker: what is wrong with its ids, or None; the ids, or None without
            any; and whether it must have ids if the others have some. Without rows it need not.
    """
    unfit = [
        problem + (f" on worker {worker}" if len(told) > 1 else "")
        for worker, (problem, _, _) in enumerate(told)
        if problem
    ]
    if unfit:
        raise ArgumentError(
            "`clients` must be a whole number or a string for each row. Received: "
            f"{'; '.join(unfit)}."
        )
    have = [ids is not None for _, ids, counts in told if counts]
    without = [str(w) for w, (_, ids, counts) in enumerate(told) if counts and ids is None]
    if without and any(have):
        raise ArgumentError(
            "Either all workers that hold rows must pass `clients`, or none. Received: none on "
            f"worker {', '.join(without)} of {len(told)}. Pass the id of each row on every "
            "worker."
        )
    return any(have)
