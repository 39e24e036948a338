"""What the workers tell each other of rows that each has of its own: numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tfdist.errors import ArgumentError
from tfdist.samplers import Rows
from tfdist.samplers.classes import group_rows
from tfdist.strategies.base import Strategy

_SHOWN_CLASSES = 8


@dataclass(frozen=True)
class Holdings:
    """How many rows each worker holds.

    Attributes:
        rows: By worker.
        names: The classes that occur, in ascending order, or None where rows have none. A
            combination of labels is a tuple of columns.
        counts: Rows by worker and class; empty where rows have no classes.
        columns: Of labels of shape [rows, columns], otherwise None.
    """

    rows: list[int]
    names: list[Any] | None
    counts: list[list[int]]
    columns: int | None = None

    @property
    def first_rows(self) -> list[int]:
        """The number in the union of each worker's first row, and the rows of all."""
        return [0, *np.cumsum(self.rows).tolist()]

    def labels(self) -> Any:
        """Makes labels of the union up, each worker's class by class."""
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

        The Jensen-Shannon divergence of the workers' class shares, each weighted by its rows,
        over the entropy of these weights (Lin, "Divergence measures based on the Shannon
        entropy", 1991, section 4).

        Returns:
            0 where all have the same shares, 1 where no two have a class in common; None
            where fewer than two hold rows, or rows have no classes.
        """
        held = np.array([counts for counts in self.counts if sum(counts)], float)
        if len(held) < 2:
            return None
        joint = held / held.sum()
        by_worker, by_class = joint.sum(1), joint.sum(0)
        divergence = _entropy(by_class) - sum(
            share * _entropy(row / share) for share, row in zip(by_worker, joint, strict=True)
        )
        return max(0.0, float(divergence / _entropy(by_worker)))

    def weight_of(self, worker: int) -> float:
        """Gives the weight of each row of a worker where all workers with rows weigh the same.

        Args:
            worker: The worker.

        Returns:
            A number whose mean over all rows is 1.
        """
        holders = sum(1 for rows in self.rows if rows)
        return sum(self.rows) / (holders * max(1, self.rows[worker]))

    def table(self, per_step: list[float]) -> str:
        """Writes down what each worker holds, and the share of each class in it.

        Args:
            per_step: Rows of each worker in a step.
        """
        lines = [["worker", "rows", "rows a step", *_class_names(self)]]
        for worker, rows in enumerate(self.rows):
            shares = _class_shares(self, worker)
            lines.append([str(worker), f"{rows:,}", f"{per_step[worker]:.1f}", *shares])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )


def _entropy(shares: Any) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())


def exchange(strategy: Strategy, num_rows: int, labels: Any) -> tuple[Holdings, Rows | None]:
    """Tells the other workers how many rows of each class this one holds.

    Args:
        strategy: Whose workers there are.
        num_rows: Rows that this worker holds.
        labels: Their classes, as `tfdist.samplers` take them, or anything else.

    Returns:
        What every worker holds, and the order of this worker's rows class by class, or None
        where rows have no classes.

    Raises:
        ArgumentError: Nobody holds a row.
    """
    found = _by_class(num_rows, labels)
    columns = labels.shape[1] if found and labels.ndim == 2 and labels.shape[1] > 1 else None
    mine = None if found is None else [(name, len(rows)) for name, rows in found.items()]
    everyone = strategy.gather_objects([num_rows, mine, columns])
    rows = [held for held, _, _ in everyone]
    if not sum(rows):
        raise ArgumentError(
            "At least one worker must hold an example. Received: no rows on any of "
            f"{len(rows)} workers. Check the path or the filter that produced the data."
        )
    if found is None or any(classes is None for _, classes, _ in everyone):
        return Holdings(rows, None, []), None
    tables = [dict(classes) for _, classes, _ in everyone]
    names = sorted({name for table in tables for name in table})
    counts = [[table.get(name, 0) for name in names] for table in tables]
    parts = [found[name] for name in names if name in found]
    order = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return Holdings(rows, names, counts, columns), order


def _by_class(num_rows: int, labels: Any) -> dict[Any, Any] | None:
    """Groups this worker's rows by class, or gives None where they have none."""
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


def _class_names(holdings: Holdings) -> list[str]:
    names = holdings.names or []
    shown = [f"class {_short(name)}" for name in names[:_SHOWN_CLASSES]]
    return [*shown, "others"] if len(names) > _SHOWN_CLASSES else shown


def _short(name: Any) -> str:
    return "+".join(map(str, name)) or "none" if isinstance(name, tuple) else str(name)


def _class_shares(holdings: Holdings, worker: int) -> list[str]:
    if holdings.names is None:
        return []
    counts, rows = holdings.counts[worker], holdings.rows[worker]
    shown = counts[:_SHOWN_CLASSES]
    if len(counts) > _SHOWN_CLASSES:
        shown = [*shown, sum(counts[_SHOWN_CLASSES:])]
    return [f"{count / rows:.1%}" if rows else "-" for count in shown]
