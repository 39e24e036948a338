"""A report on the distribution of classes."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tfdist.data.class_weight import EffectiveNumber
from tfdist.figures import html_table, new_figure
from tfdist.samplers.classes import count_classes

_MOST_NAMED = 40  # with more bars, there is no space for their names


@dataclass(frozen=True)
class ImbalanceReport:
    """How often each class comes; prints as a table.

    Attributes:
        classes: The classes that occur, in ascending order; None is the class of rows without
            any label.
        counts: Rows of each class.
        rows: Rows of the data. If rows have several labels, the counts add up to more.
        effective: The effective number of examples of each class.
        beta: The beta of the effective numbers.
        figure: A `matplotlib.figure.Figure` if `plot` was set, otherwise None.
    """

    classes: tuple[Any, ...]
    counts: tuple[int, ...]
    rows: int
    effective: tuple[float, ...]
    beta: float
    figure: Any = None

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each class in the rows."""
        return tuple(count / self.rows for count in self.counts)

    @property
    def ratio(self) -> float:
        """The imbalance ratio: rows of the largest class, divided by rows of the smallest."""
        return max(self.counts) / min(self.counts)

    def __rich__(self) -> Table:
        table = Table(title=self._title, title_justify="left", box=box.ROUNDED)
        name, *numbers = self._columns
        table.add_column(name)
        for column in numbers:
            table.add_column(column, justify="right")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def _repr_html_(self) -> str:
        return html_table(self._columns, self._cells(), self._title)

    @property
    def _title(self) -> str:
        return f"{self.rows:,} rows, {len(self.counts)} classes, ratio {self.ratio:,.1f}"

    @property
    def _columns(self) -> tuple[str, ...]:
        return "class", "rows", "share", f"effective (beta {self.beta:g})"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                "no label" if name is None else str(name),
                f"{count:,}",
                f"{share:.3%}",
                f"{effective:,.1f}",
            )
            for name, count, share, effective in zip(
                self.classes, self.counts, self.shares, self.effective, strict=True
            )
        ]

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=80).print(self)
        return text.getvalue().rstrip()


def report(y: Any, *, beta: float = 0.999, plot: bool = False) -> ImbalanceReport:
    """Counts the classes and reports how unequal they are.

    Args:
        y: The classes, an array of shape [rows] of whole numbers, booleans or text, or of
            shape [rows, classes] of zeros and ones.
        beta: The beta of the effective number of examples, (1 - beta^n) / (1 - beta) (Cui et
            al., "Class-balanced loss based on effective number of samples", CVPR 2019).
        plot: Whether to draw a bar for each class, on a logarithmic axis; needs matplotlib.

    Returns:
        An `ImbalanceReport`; `print` shows it as a table.

    Raises:
        ArgumentError: `y` is not classes, or `beta` is below 0, or not below 1.
        MissingPackageError: `plot` is set, and matplotlib is not installed.

    Example:
        >>> import numpy as np
        >>> from tfdist.imbalance import report
        >>> found = report(np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1]))
        >>> found.counts, found.shares, found.ratio
        ((8, 2), (0.8, 0.2), 4.0)
    """
    names, counts = count_classes(y, "y")
    summary = ImbalanceReport(
        tuple(names),
        tuple(counts.tolist()),
        len(y),
        tuple(EffectiveNumber(beta).of(counts)),
        beta,
    )
    return dataclasses.replace(summary, figure=_bars(summary)) if plot else summary


def _bars(summary: ImbalanceReport) -> Any:
    figure = new_figure(figsize=(max(4.0, min(12.0, 0.3 * len(summary.counts))), 3.5))
    axes = figure.subplots()
    places = range(len(summary.counts))
    axes.bar(places, summary.counts, color="tab:blue")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set_ylabel("rows")
    axes.set_xlabel("class")
    if len(summary.counts) <= _MOST_NAMED:
        names = ["no label" if name is None else str(name) for name in summary.classes]
        axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_title(f"ratio {summary.ratio:,.1f}")
    return figure
