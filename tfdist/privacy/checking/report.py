"""What a check of private training found."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was measured.

    Attributes:
        name: What it is of.
        measured: Its value, or the probability of a value as extreme in a sound mechanism.
        expected: What it is in a sound mechanism; of a probability, any from 0 to 1.
        lowest: The least value that passes.
        highest: The largest value that passes.
        detail: From how much it was measured, and which error it finds.
    """

    name: str
    measured: float
    expected: float
    lowest: float
    highest: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within its limits; NaN is not."""
        return self.lowest <= self.measured <= self.highest

    def __str__(self) -> str:
        within = f"{self.lowest:.6g} to {self.highest:.6g}"
        if math.isinf(self.lowest):
            within = f"at most {self.highest:.6g}"
        verdict = "ok    " if self.passed else "FAILED"
        text = f"{verdict} {self.name}: {self.measured:.6g} ({within})"
        return f"{text}; {self.detail}" if self.detail else text


def of_probability(name: str, probability: float, least: float, detail: str = "") -> Finding:
    """Makes the fact of a statistical test.

    Args:
        name: What it is of.
        probability: Of so extreme a value in a sound mechanism, times the number of values
            that were looked at.
        least: Fails below it.
        detail: As in `Finding`.
    """
    return Finding(f"{name}, p-value", min(1.0, probability), 0.5, least, 1.0, detail)


@dataclass(frozen=True)
class CheckReport:
    """What `tfdist.privacy.check` measured.

    A sound mechanism passes with a probability of at least 1 - `false_alarm`. That all passed
    is no proof: what was not measured, or not on this model, may be wrong.

    Attributes:
        facts: What was measured.
        notes: What was not, and why.
        false_alarm: At most so probable is any failure of a statistical test by chance.
        seconds: How long it took.
    """

    facts: tuple[Finding, ...]
    notes: tuple[str, ...]
    false_alarm: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all is as it must be."""
        return all(fact.passed for fact in self.facts)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """What is not as it must be."""
        return tuple(fact for fact in self.facts if not fact.passed)

    def __getitem__(self, name: str) -> Finding:
        """Returns the fact of a name, or the first that begins with it."""
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
