"""Sums up how far predicted steps are from measured ones, and how good the choices are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

CLOSE = 1.1  # a choice is right if it takes at most this many times the fastest


@dataclass(frozen=True)
class Case:
    """A model on a machine.

    Attributes:
        name: What is trained, and where.
        measured: Seconds of a step, by strategy.
        predicted: The same as predicted, by the kind of links and the strategy.
        chosen: The recommended strategy, by the kind of links.
    """

    name: str
    measured: Mapping[str, float]
    predicted: Mapping[str, Mapping[str, float]]
    chosen: Mapping[str, str | None]

    def error(self, kind: str, strategy: str) -> float:
        """Returns by which part of the measured step the prediction is longer.

        Args:
            kind: The kind of links.
            strategy: The strategy.

        Example:
            >>> case = Case("", {"single": 2.0}, {"usual": {"single": 1.5}}, {})
            >>> case.error("usual", "single")
            -0.25
        """
        return self.predicted[kind][strategy] / self.measured[strategy] - 1

    def is_right(self, kind: str) -> bool:
        """Says whether the recommended strategy is the fastest measured one, or close to it.

        A strategy that was not measured is not right.

        Args:
            kind: The kind of links.
        """
        chosen = self.measured.get(self.chosen[kind] or "")
        return chosen is not None and chosen <= CLOSE * min(self.measured.values())

    @property
    def fastest(self) -> str:
        """The strategy with the shortest measured step."""
        return min(self.measured, key=lambda strategy: self.measured[strategy])


@dataclass(frozen=True)
class Totals:
    """Of all cases.

    Attributes:
        median_error: The median of the cells' errors, without their signs.
        largest_error: The largest of them.
        cells: Number of pairs of a case and a strategy.
        right: Number of cases whose recommended strategy is right.
        single_is_fastest: Number of cases in which one process is fastest. Whoever always
            chose it would be right at least in these.
        cases: Number of cases.
    """

    median_error: float
    largest_error: float
    cells: int
    right: int
    single_is_fastest: int
    cases: int


def totals(cases: Sequence[Case], kind: str) -> Totals:
    """Sums cases up.

    Args:
        cases: The cases; at least one.
        kind: The kind of links.
    """
    errors = [abs(case.error(kind, s)) for case in cases for s in case.measured]
    return Totals(
        median(errors),
        max(errors),
        len(errors),
        sum(case.is_right(kind) for case in cases),
        sum(case.fastest == "single" for case in cases),
        len(cases),
    )


def table_of(cases: Iterable[Case], strategies: Iterable[str], kind: str) -> list[list[str]]:
    """Gives a row for each case: "predicted / measured (error)" of each strategy, the choice.

    Args:
        cases: The cases.
        strategies: The strategies, as columns.
        kind: The kind of links.
    """
    names = list(strategies)
    rows = []
    for case in cases:
        cells = [_cell(case, kind, name) if name in case.measured else "" for name in names]
        right = "yes" if case.is_right(kind) else f"no: {case.fastest}"
        rows.append([case.name, *cells, case.chosen[kind] or "none", right])
    return rows


def _cell(case: Case, kind: str, strategy: str) -> str:
    predicted, measured = case.predicted[kind][strategy], case.measured[strategy]
    error = 100 * case.error(kind, strategy)
    return f"{_ms(predicted)} / {_ms(measured)} ({error:+.0f} %)"


def _ms(seconds: float) -> str:
    """Gives milliseconds: one decimal place below 100."""
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"
