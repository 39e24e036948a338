"""The accounting of noise that differs between steps. Needs no TensorFlow.

A run then has a phase for each multiplier. A step's multiplier follows from its place, and a
process makes its steps in order. So a phase of `n` steps stands for the first `n` steps of the
run with this multiplier, and `Ledger.merged` may take the larger number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tfdist.privacy.accounting.phase import Phase


@dataclass(frozen=True)
class Levels:
    """The multiplier of each step, as runs of steps with equal multipliers.

    Args:
        begins: The first step of each run, beginning with 0. The last run has no end.
        multipliers: The multiplier of each run.
    """

    begins: tuple[int, ...]
    multipliers: tuple[float, ...]

    @property
    def least(self) -> float:
        """The smallest multiplier."""
        return min(self.multipliers)

    def counts(self, first: int, steps: int) -> dict[float, int]:
        """Counts the steps with each multiplier.

        Args:
            first: The number of the first step.
            steps: The number of steps.

        Returns:
            The number of steps by multiplier, in the order of their first steps.
        """
        counts: dict[float, int] = {}
        # The last level has no end, so it lasts to the last of these steps.
        ends = (*self.begins[1:], first + steps)
        for begin, end, multiplier in zip(self.begins, ends, self.multipliers, strict=True):
            count = min(end, first + steps) - max(begin, first)
            if count > 0:
                counts[multiplier] = counts.get(multiplier, 0) + count
        return counts

    def phases(self, phase: Phase, first: int, steps: int) -> list[Phase]:
        """Describes successive steps, with a phase for each multiplier.

        Args:
            phase: The phase of all steps, except for the multiplier and the number.
            first: As in `counts`.
            steps: As in `counts`.
        """
        return [
            replace(phase, noise_multiplier=noise, steps=count)
            for noise, count in self.counts(first, steps).items()
        ]

    def steps_in(self, phases: Iterable[Phase]) -> int:
        """Counts the steps in phases that `phases` has made.

        Args:
            phases: Phases of one run.
        """
        return sum(phase.steps for phase in phases)

    def factor_in(self, phases: Iterable[Phase], phase: Phase) -> float | None:
        """Finds the factor by which the multipliers were scaled in earlier steps.

        Args:
            phases: Steps of the same training, in order.
            phase: One step. Only its noise may differ from these steps.

        Returns:
            The factor, or None if other settings differ.
        """
        phases = [p for p in phases if p.steps]
        if not phases or not self.multipliers[0]:
            return None
        factor = phases[0].noise_multiplier / self.multipliers[0]
        return factor if all(self._has(p, phase, factor) for p in phases) else None

    def _has(self, earlier: Phase, phase: Phase, factor: float) -> bool:
        noise = earlier.noise_multiplier
        unscaled = replace(earlier, noise_multiplier=phase.noise_multiplier, steps=phase.steps)
        # A phase has one multiplier of the schedule, so any level may fit it.
        levels = (factor * multiplier for multiplier in self.multipliers)
        return unscaled == phase and any(math.isclose(noise, m, rel_tol=1e-9) for m in levels)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, without norms."""
        return {"begins": list(self.begins), "multipliers": list(self.multipliers)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Levels:
        """Reads the result of `to_dict`.

        Args:
            saved: The dict.
        """
        return Levels(tuple(saved["begins"]), tuple(saved["multipliers"]))
