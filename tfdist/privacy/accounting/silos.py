"""The private steps that each client of federated training makes by itself, in rounds.

Needs neither TensorFlow nor NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tfdist.privacy.accounting.phase import Phase


@dataclass(frozen=True)
class Silos:
    """The clients, each of which makes the same number of private steps in each round.

    In a step, a client draws each of its examples by an independent coin. A `Spending` counts
    rounds, as it counts steps elsewhere.

    Args:
        sizes: The number of examples of each client. Those without examples make no steps.
        batch_size: The expected number of drawn examples, if a client has as many.
        local_steps: The steps of a client in a round.
    """

    sizes: tuple[int, ...]
    batch_size: int
    local_steps: int

    def phases(self, phase: Phase, first: int, steps: int) -> list[Phase]:
        """Describes rounds, with a phase for each client.

        Args:
            phase: What the steps of all clients have in common.
            first: Not used: all rounds are alike.
            steps: The number of rounds.
        """
        return [
            replace(
                phase,
                sampling_probability=min(1.0, self.batch_size / size),
                steps=steps * self.local_steps,
                num_rows=size,
                part=number,
            )
            for number, size in enumerate(self.sizes)
            if size
        ]

    def steps_in(self, phases: Sequence[Phase]) -> int:
        """Counts the rounds in phases that `phases` has made.

        Args:
            phases: Phases of one run.
        """
        most = max((phase.steps for phase in phases), default=0)
        return -(-most // self.local_steps)

    def factor_in(self, phases: Iterable[Phase], phase: Phase) -> float | None:
        """Finds the noise of earlier steps of the same training.

        Args:
            phases: Its steps, in order.
            phase: What the steps of all clients have in common, without noise.

        Returns:
            The noise, or None if other settings differ.
        """
        phases = [p for p in phases if p.steps]
        if not phases:
            return None
        noise = phases[0].noise_multiplier
        expected = {
            p.part: p for p in self.phases(replace(phase, noise_multiplier=noise), 0, 1)
        }
        same = all(
            p.part in expected and replace(p, steps=self.local_steps) == expected[p.part]
            for p in phases
        )
        return noise if same else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "sizes": list(self.sizes),
            "batch_size": self.batch_size,
            "local_steps": self.local_steps,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Silos:
        """Reads the result of `to_dict`.

        Args:
            saved: The dict.
        """
        return Silos(tuple(saved["sizes"]), saved["batch_size"], saved["local_steps"])
