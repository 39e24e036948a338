"""What private steps were made, and what they cost together.

The numbers are dp-accounting's; this file only says to it what happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting import composable
from tfdist.privacy.accounting.arguments import check_choice, check_number
from tfdist.privacy.accounting.chains import mechanisms
from tfdist.privacy.accounting.identity import named, run_of, union
from tfdist.privacy.accounting.phase import EXAMPLE, USER, Phase, dp_accounting

__all__ = ["ACCOUNTANTS", "EXAMPLE", "RELATIONS", "USER", "Ledger", "Phase", "dp_accounting"]

ACCOUNTANTS = ("pld", "rdp")
RELATIONS = ("add_or_remove_one", "replace_special", "replace_one")


@dataclass(frozen=True, eq=False)
class Ledger:
    """All private steps that were made on the same data.

    A ledger does not change: `add` gives another one. Whatever released something about
    the data must be in it: several calls of `fit`, a run that was resumed, another batch
    size or another noise.

    **What counts as the same steps.** A `run_id` names the steps that one process made in one
    `fit`, one after the other; a process that resumes a training takes a new one. A phase of
    `n` steps stands for the first `n` steps of its run, or, where noise follows a schedule, for
    the first `n` of those with its multiplier. So of two ledgers that know a run, the
    one with more steps of it knows all that the other does, and `merged` has exactly the steps
    that one of them knows, each once, whatever was copied, resumed or lost: it counts too few
    only if both do.

    A phase that you make yourself gets a name when it comes into a ledger: of steps that are
    in no other one. Pass the same ledger again, or one read from its `to_dict`, to speak of
    the same steps; or give your phase a `run_id` of your choice.

    Args:
        phases: What was made.

    Example:
        >>> first = Phase(sampling_probability=0.01, noise_multiplier=1.0, steps=100)
        >>> second = Phase(sampling_probability=0.02, noise_multiplier=1.5, steps=50)
        >>> ledger = Ledger().add(first).add(second)
        >>> ledger.steps
        150
        >>> Ledger.from_dict(ledger.to_dict()) == ledger
        True
        >>> ledger.merged(ledger).steps, ledger.merged(Ledger((first,))).steps
        (150, 250)
    """

    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        if not all(phase.run_id for phase in self.phases):
            object.__setattr__(self, "phases", tuple(map(named, self.phases)))

    @property
    def secret(self) -> bool:
        """Whether all random numbers came from the operating system."""
        return all(phase.secret for phase in self.phases if phase.steps)

    def __eq__(self, other: object) -> bool:
        """Whether the same steps were made, in the same order, by whatever processes."""
        return isinstance(other, Ledger) and self.mechanisms == other.mechanisms

    def __hash__(self) -> int:
        return hash(tuple(self.mechanisms))

    @property
    def mechanisms(self) -> list[Phase]:
        """What was made, without regard to which process made it; see `chains`."""
        return mechanisms(self.phases)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return sum(phase.steps for phase in self.phases)

    @property
    def unit(self) -> str:
        """What is protected, an "example" or a "user"; see `check_unit`."""
        self.check_unit()
        return next((phase.unit for phase in self.phases if phase.steps), EXAMPLE)

    def check_relation(self, relation: str) -> None:
        """Refuses a relation under which correlated noise has another cost.

        Args:
            relation: As in `epsilon`.

        Raises:
            ArgumentError: Steps without sampling are to be judged by what one example more or
                less changes: it would move all others to other batches.
        """
        composable.check_relation(self.phases, relation)

    def check_unit(self) -> None:
        """Refuses steps of which some protect examples, and some users.

        Raises:
            ArgumentError: There are such.
        """
        composable.check_unit(self.phases)

    def add(self, phase: Phase) -> Ledger:
        """Gives the ledger with more steps in it.

        Args:
            phase: The steps. Of a run that the last phase is of, they come after those.
        """
        if not phase.steps:
            return self
        last = self.phases[-1] if self.phases else phase
        is_more = bool(self.phases and phase.run_id) and (run_of(last), last.groups) == (
            run_of(phase),
            phase.groups,
        )
        if is_more and phase.bands is None:
            joined = replace(last, steps=last.steps + phase.steps)
            return Ledger((*self.phases[:-1], joined))
        return Ledger((*self.phases, phase))

    def merged(self, other: Ledger) -> Ledger:
        """Gives the ledger with what another one has beyond it.

        Args:
            other: Steps on the same data; of a run that both know the larger number counts.
        """
        return Ledger(union(self.phases, other.phases))

    def renamed(self, names: Mapping[str, str]) -> Ledger:
        """Gives the ledger with other names of runs.

        Args:
            names: The new ones, by those that they replace.
        """
        return Ledger(
            tuple(replace(p, run_id=names.get(p.run_id, p.run_id)) for p in self.phases)
        )

    def without(self, run_id: str) -> Ledger:
        """Gives the ledger without the steps of a training.

        Args:
            run_id: As in `Phase`.
        """
        return Ledger(tuple(p for p in self.phases if p.run_id != run_id))

    def epsilon(
        self,
        delta: float,
        *,
        accountant: str = "pld",
        relation: str = "add_or_remove_one",
        coarse: bool = False,
    ) -> float:
        """Computes the epsilon of all steps together.

        Args:
            delta: Between 0 and 1, far below 1 / the number of examples.
            accountant: As in `tfdist.privacy.epsilon`.
            relation: As in `tfdist.privacy.epsilon`.
            coarse: Whether "pld" may give some percent too much, in a tenth of the time.

        Returns:
            Epsilon; infinity if a step had no noise.

        Raises:
            ArgumentError: A value is out of its range, or the accountant cannot do it.
            MissingPackageError: dp-accounting is not installed.

        Example:
            >>> phase = Phase(sampling_probability=0.01, noise_multiplier=4.0, steps=10000)
            >>> round(Ledger((phase,)).epsilon(1e-5), 2)
            0.95
        """
        check_choice("accountant", accountant, ACCOUNTANTS)
        check_choice("relation", relation, RELATIONS)
        check_number("delta", delta, 0, 1, open_ends=True)
        self.check_unit()
        self.check_relation(relation)
        steps_of: dict[Phase, int] = {}
        found = self.mechanisms
        made = [phase for phase in found if phase.bands is not None]
        for phase in found:
            if phase.bands is None:
                key = replace(phase, steps=0)
                steps_of[key] = steps_of.get(key, 0) + phase.steps
        made += [
            replace(p, steps=n) for p, n in steps_of.items() if n and p.sampling_probability
        ]
        if not made:
            return 0.0
        if any(phase.noise_multiplier == 0 for phase in made):
            return math.inf
        dp_accounting()  # said to be missing before SciPy, which it brings, is
        from tfdist.privacy.accounting import accountants

        if accountant == "rdp":
            return accountants.rdp_epsilon(made, delta, relation)
        return accountants.pld_epsilon(made, delta, relation, 10.0 if coarse else 1.0)

    def affordable(
        self,
        phase: Phase,
        *,
        max_epsilon: float,
        delta: float,
        accountant: str = "pld",
        relation: str = "add_or_remove_one",
        coarse: bool = False,
    ) -> int:
        """Counts how many steps of a phase may follow within a budget.

        Args:
            phase: What is planned; at most its `steps`.
            max_epsilon: What all steps together may cost.
            delta: As in `epsilon`.
            accountant: As in `epsilon`.
            relation: As in `epsilon`.
            coarse: As in `epsilon`; some steps too few, then.

        Returns:
            From 0 to `phase.steps`, the most that stay within the budget.

        Raises:
            ArgumentError: As `epsilon`.
            MissingPackageError: As `epsilon`.

        Example:
            >>> phase = Phase(sampling_probability=0.01, noise_multiplier=4.0, steps=20000)
            >>> 10000 < Ledger().affordable(phase, max_epsilon=1.0, delta=1e-5) < 12000
            True
        """
        check_number("max_epsilon", max_epsilon, 0)

        def cost(steps: int) -> float:
            ledger = self.add(replace(phase, steps=steps))
            return ledger.epsilon(
                delta, accountant=accountant, relation=relation, coarse=coarse
            )

        return most_within(cost, max_epsilon, phase.steps)

    def to_dict(self) -> dict[str, Any]:
        """Gives numbers, strings, lists and dicts only, as JSON has them."""
        return {"phases": [asdict(phase) for phase in self.phases]}

    @classmethod
    def from_dict(cls, saved: Any) -> Ledger:
        """Makes a ledger of what `to_dict` gave.

        Args:
            saved: The dict.

        Raises:
            ArgumentError: It is none.
        """
        try:
            phases = saved["phases"]
            if not isinstance(phases, (list, tuple)):
                raise TypeError("`phases` must be a list")
            return cls(tuple(Phase(**phase) for phase in phases))
        except (TypeError, KeyError) as error:
            raise ArgumentError(
                "A ledger must be read from what `Ledger.to_dict` gave. "
                f"Received: {saved!r} ({error})."
            ) from None


def most_within(cost: Callable[[int], float], max_epsilon: float, most: int) -> int:
    """Counts how many steps stay within a budget.

    Args:
        cost: The epsilon of so many steps; it grows with them.
        max_epsilon: What they may cost.
        most: The most steps.
    """

    def gap(steps: float) -> float:
        return min(cost(round(steps)), 1e9) - max_epsilon

    if gap(0) > 0:
        return 0
    if gap(most) <= 0:
        return most
    from scipy import optimize  # dp-accounting brings it

    count: int = round(optimize.brentq(gap, 0, most, xtol=0.5))
    while gap(count) > 0:
        count -= 1
    while gap(count + 1) <= 0:
        count += 1
    return count
