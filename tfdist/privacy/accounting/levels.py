"""Noise that is not the same in all steps, as the books have it. Needs no TensorFlow.

A run then has a phase for each multiplier. Which step gets which one is fixed by its place, and
a process makes its steps in order. So among the steps of a run with one multiplier, a phase of
`n` steps stands for the first `n` of these, and `Ledger.merged` may take the larger number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tfdist.privacy.accounting.phase import Phase


@dataclass(frozen=True)
class Levels:
    """The multiplier of each step, as runs of steps that have the same.

    Args:
        begins: The first step of each run; of the first run it is 0. The last one has no end.
        multipliers: Of each run.
    """

    begins: tuple[int, ...]
    multipliers: tuple[float, ...]

    @property
    def least(self) -> float:
        """The smallest multiplier."""
        return min(self.multipliers)

    def counts(self, first: int, steps: int) -> dict[float, int]:
        """Says how many steps have which multiplier.

        Args:
            first: The number of the first step.
            steps: How many steps, from that one on.

        Returns:
            Steps by multiplier, in the order in which they first come.
        """
        found: dict[float, int] = {}
        ends = (*self.begins[1:], first + steps)
        for begin, end, multiplier in zip(self.begins, ends, self.multipliers, strict=True):
            count = min(end, first + steps) - max(begin, first)
            if count > 0:
                found[multiplier] = found.get(multiplier, 0) + count
        return found

    def phases(self, phase: Phase, first: int, steps: int) -> list[Phase]:
        """Describes steps one after the other, a phase for each multiplier.

        Args:
            phase: What they have in common.
            first: As in `counts`.
            steps: As in `counts`.
        """
        return [
            replace(phase, noise_multiplier=noise, steps=count)
            for noise, count in self.counts(first, steps).items()
        ]

    def factor_in(self, made: Iterable[Phase], phase: Phase) -> float | None:
        """Finds what the multipliers were multiplied by.

        Args:
            made: Steps of the same training, its first one first.
            phase: One step as they must be, whatever its noise.

        Returns:
            The factor, or None if they are others.
        """
        made = [p for p in made if p.steps]
        if not made or not self.multipliers[0]:
            return None
        factor = made[0].noise_multiplier / self.multipliers[0]
        return factor if all(self._has(p, phase, factor) for p in made) else None

    def _has(self, made: Phase, phase: Phase, factor: float) -> bool:
        noise = made.noise_multiplier
        as_now = replace(made, noise_multiplier=phase.noise_multiplier, steps=phase.steps)
        levels = (factor * multiplier for multiplier in self.multipliers)
        return as_now == phase and any(math.isclose(noise, m, rel_tol=1e-9) for m in levels)

    def to_dict(self) -> dict[str, Any]:
        """Gives what JSON can hold, without norms."""
        return {"begins": list(self.begins), "multipliers": list(self.multipliers)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Levels:
        """Reads what `to_dict` gave.

        Args:
            saved: The dict.
        """
        return Levels(tuple(saved["begins"]), tuple(saved["multipliers"]))
