"""The report of a check of private training."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One measurement.

    Attributes:
        name: The name of the measured property.
        measured: The measured value, or the p-value of a statistical test.
        expected: The value of a sound mechanism. A p-value may be any number from 0 to 1.
        lowest: The least value that passes.
        highest: The largest value that passes.
        detail: The size of the measurement, and the error that it finds.
    """

    name: str
    measured: float
    expected: float
    lowest: float
    highest: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within its limits. NaN is not."""
        return self.lowest <= self.measured <= self.highest

    def __str__(self) -> str:
        within = f"{self.lowest:.6g} to {self.highest:.6g}"
        if math.isinf(self.lowest):
            within = f"at most {self.highest:.6g}"
        verdict = "ok    " if self.passed else "FAILED"
        text = f"{verdict} {self.name}: {self.measured:.6g} ({within})"
        return f"{text}; {self.detail}" if self.detail else text


def of_probability(name: str, probability: float, least: float, detail: str = "") -> Finding:
    """Makes the finding of a statistical test.

    Args:
        name: As in `Finding`.
        probability: The probability of a value as extreme in a sound mechanism, times the
            number of values that were compared.
        least: The least probability that passes.
        detail: As in `Finding`.
    """
    return Finding(f"{name}, p-value", min(1.0, probability), 0.5, least, 1.0, detail)


@dataclass(frozen=True)
class CheckReport:
    """The results of `tfdist.privacy.check`.

    A sound mechanism passes with a probability of at least 1 - `false_alarm`. If all findings
    pass, this is not a proof: properties that were not measured may be wrong.

    Attributes:
        facts: The findings.
        notes: Properties that were not measured, and why.
        false_alarm: A bound of the probability that any statistical test fails by chance.
        seconds: The time of the check.
    """

    facts: tuple[Finding, ...]
    notes: tuple[str, ...]
    false_alarm: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all findings pass."""
        return all(fact.passed for fact in self.facts)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that do not pass."""
        return tuple(fact for fact in self.facts if not fact.passed)

    def __getitem__(self, name: str) -> Finding:
        """Returns the first finding whose name begins with a text."""
        for fact in self.facts:
            if fact.name.startswith(name):
                return fact
        raise KeyError(name)

    def __str__(self) -> str:
        failed = len(self.failures)
        verdict = f"{failed} FAILED" if failed else "all passed"
        head = (
            f"{len(self.facts)} facts of private training in {self.seconds:.0f} s: {verdict} "
            f"(false alarms: probability below {self.false_alarm:g})"
        )
        notes = [f"not measured: {note}" for note in self.notes]
        return "\n".join([head, *map(str, self.facts), *notes])
