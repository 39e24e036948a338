"""The numbers of rows by worker and class, which the workers tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tfdist.errors import ArgumentError
from tfdist.figures import text_table
from tfdist.samplers import Rows
from tfdist.samplers.classes import group_rows
from tfdist.strategies.base import Strategy

_SHOWN_CLASSES = 8


@dataclass(frozen=True)
class RowsPerWorker:
    """How many rows each worker holds.

    Attributes:
        rows: Rows by worker.
        names: The classes that occur, in ascending order, or None if rows have no classes. A
            combination of labels is a tuple of columns.
        counts: Rows by worker and class; empty if rows have no classes.
        columns: The columns of labels of shape [rows, columns], otherwise None.
    """

    rows: list[int]
    names: list[Any] | None
    counts: list[list[int]]
    columns: int | None = None

    @property
    def first_rows(self) -> list[int]:
        """The number of each worker's first row in the global data set, and the rows of all."""
        return [0, *np.cumsum(self.rows).tolist()]

    def labels(self) -> Any:
        """Makes labels for the global data set; each worker's rows are ordered by class."""
        if self.names is None:
            return None
        numbers = np.concatenate(
            [np.repeat(np.arange(len(self.names)), counts) for counts in self.counts]
        )
        if self.columns is None:
            return np.array(self.names)[numbers]
        hot = np.zeros((len(self.names), self.columns), bool)
        for row, name in zip(hot, self.names, strict=True):
            row[list(name)] = True
        return hot[numbers]

    def skew(self) -> float | None:
        """Measures how much the classes differ between workers.

        It is the Jensen-Shannon divergence of the workers' class shares, weighted by their
        rows and divided by the entropy of these weights (Lin, "Divergence measures based on
        the Shannon entropy", 1991, section 4).

        Returns:
            0 if all workers have the same shares, 1 if no two workers have a class in common.
            None if fewer than two workers hold rows, or if rows have no classes.
        """
        counts_of_holders = np.array([counts for counts in self.counts if sum(counts)], float)
        if len(counts_of_holders) < 2:
            return None
        joint = counts_of_holders / counts_of_holders.sum()
        by_worker, by_class = joint.sum(1), joint.sum(0)
        divergence = _entropy(by_class) - sum(
            share * _entropy(row / share) for share, row in zip(by_worker, joint, strict=True)
        )
        return max(0.0, float(divergence / _entropy(by_worker)))

    def weight_of(self, worker: int) -> float:
        """Returns the weight of a worker's rows if all workers with rows weigh the same.

        Args:
            worker: The worker.

        Returns:
            The weight; its mean over the rows of all workers is 1.
        """
        holders = sum(1 for rows in self.rows if rows)
        return sum(self.rows) / (holders * max(1, self.rows[worker]))

    def table(self, per_step: list[float]) -> str:
        """Makes a table of each worker's rows, and of the share of each class in them.

        Args:
            per_step: Rows of each worker in a step.
        """
        lines = [["worker", "rows", "rows a step", *_class_names(self)]]
        for worker, rows in enumerate(self.rows):
            shares = _class_shares(self, worker)
            lines.append([str(worker), f"{rows:,}", f"{per_step[worker]:.1f}", *shares])
        return text_table(lines)


def _entropy(shares: Any) -> float:
    positive_shares = shares[shares > 0]
    return float(-(positive_shares * np.log(positive_shares)).sum())


def exchange(
    strategy: Strategy, num_rows: int, labels: Any
) -> tuple[RowsPerWorker, Rows | None]:
    """Tells the other workers how many rows of each class this worker holds.

    Args:
        strategy: The strategy of the workers.
        num_rows: Rows of this worker.
        labels: The classes of the rows, as `tfdist.samplers` take them. Anything else means
            that the rows have no classes.

    Returns:
        The rows of every worker, and the order of this worker's rows class by class, or None
        if rows have no classes.

    Raises:
        ArgumentError: No worker holds a row.
    """
    rows_by_class = _by_class(num_rows, labels)
    columns = (
        labels.shape[1] if rows_by_class and labels.ndim == 2 and labels.shape[1] > 1 else None
    )
    local_counts = (
        None
        if rows_by_class is None
        else [(name, len(rows)) for name, rows in rows_by_class.items()]
    )
    all_workers = strategy.gather_objects([num_rows, local_counts, columns])
    rows = [num_rows_of_worker for num_rows_of_worker, _, _ in all_workers]
    if not sum(rows):
        raise ArgumentError(
            "At least one worker must hold an example. Received: no rows on any of "
            f"{len(rows)} workers. Check the path or the filter that produced the data."
        )
    if rows_by_class is None or any(classes is None for _, classes, _ in all_workers):
        return RowsPerWorker(rows, None, []), None
    tables = [dict(classes) for _, classes, _ in all_workers]
    names = sorted({name for table in tables for name in table})
    counts = [[table.get(name, 0) for name in names] for table in tables]
    parts = [rows_by_class[name] for name in names if name in rows_by_class]
    order = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return RowsPerWorker(rows, names, counts, columns), order


def _by_class(num_rows: int, labels: Any) -> dict[Any, Any] | None:
    """Groups this worker's rows by class; returns None if they have no classes."""
    if not hasattr(labels, "shape") or not hasattr(labels, "ndim"):
        return None
    if num_rows == 0:
        return {}
    try:
        classes = group_rows(labels, combinations=True)
    except ArgumentError:
        return None
    groups = np.split(classes.members, classes.offsets[1:])
    return dict(zip(classes.names, groups, strict=True))


def _class_names(holdings: RowsPerWorker) -> list[str]:
    names = holdings.names or []
    shown_counts = [f"class {_short(name)}" for name in names[:_SHOWN_CLASSES]]
    return [*shown_counts, "others"] if len(names) > _SHOWN_CLASSES else shown_counts


def _short(name: Any) -> str:
    return "+".join(map(str, name)) or "none" if isinstance(name, tuple) else str(name)


def _class_shares(holdings: RowsPerWorker, worker: int) -> list[str]:
    if holdings.names is None:
        return []
    counts, rows = holdings.counts[worker], holdings.rows[worker]
    shown_counts = counts[:_SHOWN_CLASSES]
    if len(counts) > _SHOWN_CLASSES:
        shown_counts = [*shown_counts, sum(counts[_SHOWN_CLASSES:])]
    return [f"{count / rows:.1%}" if rows else "-" for count in shown_counts]
