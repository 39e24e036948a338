"""The ledger of private steps, and their cost together.

dp-accounting computes the numbers. This file describes the steps to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting import composable, parts
from tfdist.privacy.accounting.arguments import check_choice, check_number
from tfdist.privacy.accounting.chains import mechanisms
from tfdist.privacy.accounting.costs import epsilon_of
from tfdist.privacy.accounting.identity import named, run_of, union
from tfdist.privacy.accounting.phase import CLIENT, EXAMPLE, USER, Phase, dp_accounting

__all__ = [
    "ACCOUNTANTS",
    "CLIENT",
    "EXAMPLE",
    "RELATIONS",
    "USER",
    "Ledger",
    "Phase",
    "dp_accounting",
]

ACCOUNTANTS = ("pld", "rdp")
RELATIONS = ("add_or_remove_one", "replace_special", "replace_one")


@dataclass(frozen=True, eq=False)
class Ledger:
    """All private steps that were made on the same data.

    A ledger does not change: `add` returns a new one. It must contain every release of the
    data: several calls of `fit`, a resumed run, steps with another batch size or other noise.

    **What counts as the same steps.** A `run_id` names the steps that one process made in one
    `fit`, in order. A process that resumes a training has a new one. A phase of `n` steps
    stands for the first `n` steps of its run or, if noise follows a schedule, for the first `n`
    steps with its multiplier. So if two ledgers have steps of a run, the one with more steps of
    it contains those of the other. `merged` has each step of both ledgers exactly once,
    whatever was copied, resumed or lost. It counts too few steps only if both ledgers do.

    A phase that you make yourself gets a new name when it is added to a ledger: its steps are
    then in no other ledger. To refer to the same steps, pass the same ledger, or one that was
    read from its `to_dict`, or give your phase a `run_id`.

    Args:
        phases: The steps.

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
        # Named once, so that all copies of the ledger have the same names.
        if not all(phase.run_id for phase in self.phases):
            object.__setattr__(self, "phases", tuple(map(named, self.phases)))

    @property
    def secret(self) -> bool:
        """Whether all random numbers came from the operating system."""
        return all(phase.secret for phase in self.phases if phase.steps)

    def __eq__(self, other: object) -> bool:
        """Returns whether the same steps were made in the same order, by any processes."""
        return isinstance(other, Ledger) and self.mechanisms == other.mechanisms

    def __hash__(self) -> int:
        return hash(tuple(self.mechanisms))

    @property
    def mechanisms(self) -> list[Phase]:
        """The mechanisms of all steps, whichever process made them; see `chains`."""
        return mechanisms(self.phases)

    @property
    def steps(self) -> int:
        """The number of steps, or the most of any part if parts made steps of their own."""
        return parts.most_steps(self.phases)

    @property
    def parts(self) -> tuple[int, ...]:
        """The clients that made steps of their own, as in `Phase.part`; empty without any."""
        return tuple(parts.parts_of(self.phases))

    def of_part(self, part: int) -> Ledger:
        """Returns the steps in which the examples of one client may have taken part.

        Args:
            part: As in `Phase`.

        Example:
            >>> phases = [Phase(q, 1.0, 10, part=n) for n, q in enumerate((0.01, 0.5))]
            >>> ledger = Ledger(tuple(phases))
            >>> ledger.parts, ledger.steps, ledger.of_part(0).epsilon(1e-5) < 1
            ((0, 1), 10, True)
            >>> ledger.epsilon(1e-5) == ledger.of_part(1).epsilon(1e-5)  # the largest
            True
        """
        return Ledger(parts.of_part(self.phases, part))

    def dearest(self) -> list[Ledger]:
        """Returns the ledgers of the clients that may cost most, or this one without parts."""
        return [Ledger(phases) for phases in parts.dearest(self.phases)]

    @property
    def unit(self) -> str:
        """The protected unit: "example", "user" or "client"; see `check_unit`."""
        self.check_unit()
        return next((phase.unit for phase in self.phases if phase.steps), EXAMPLE)

    def check_relation(self, relation: str) -> None:
        """Refuses a relation that the accounting of correlated noise does not cover.

        Args:
            relation: As in `epsilon`.

        Raises:
            ArgumentError: The relation adds or removes an example, and steps are without
                sampling. An added example would move all others to other batches.
        """
        composable.check_relation(self.phases, relation)

    def check_unit(self) -> None:
        """Refuses steps that protect different units.

        Raises:
            ArgumentError: Some steps protect examples, and others users or clients.
        """
        composable.check_unit(self.phases)

    def add(self, phase: Phase) -> Ledger:
        """Returns the ledger with additional steps.

        Args:
            phase: The steps. If the last phase has the same run, they follow its steps.
        """
        if not phase.steps:
            return self
        last = self.phases[-1] if self.phases else phase
        continues_last = bool(self.phases and phase.run_id) and (
            (run_of(last), last.groups) == (run_of(phase), phase.groups)
        )
        # A training adds its steps in many small phases, which are one.
        if continues_last and phase.bands is None:
            joined = replace(last, steps=last.steps + phase.steps)
            return Ledger((*self.phases[:-1], joined))
        return Ledger((*self.phases, phase))

    def merged(self, other: Ledger) -> Ledger:
        """Returns the ledger with the additional steps of another one.

        Args:
            other: Steps on the same data. If both have steps of a run, the larger number
                counts.
        """
        return Ledger(union(self.phases, other.phases))

    def renamed(self, names: Mapping[str, str]) -> Ledger:
        """Returns the ledger with other names of runs.

        Args:
            names: A mapping from old to new names.
        """
        return Ledger(
            tuple(replace(p, run_id=names.get(p.run_id, p.run_id)) for p in self.phases)
        )

    def without(self, run_id: str) -> Ledger:
        """Returns the ledger without the steps of a training.

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
            coarse: Whether "pld" may return some percent too much, in a tenth of the time.

        Returns:
            Epsilon, which is infinite if a step had no noise.

        Raises:
            ArgumentError: A value is out of its range, or the accountant does not support it.
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
        factor = 10.0 if coarse else 1.0
        return max(
            epsilon_of(ledger.mechanisms, delta, accountant, relation, factor)
            for ledger in self.dearest()
        )

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
            phase: The planned steps, of which at most `steps` follow.
            max_epsilon: The budget: the largest epsilon of all steps together.
            delta: As in `epsilon`.
            accountant: As in `epsilon`.
            relation: As in `epsilon`.
            coarse: As in `epsilon`. The result may be some steps too small.

        Returns:
            The largest number of steps within the budget, from 0 to `phase.steps`.

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
        """Returns numbers, strings, lists and dicts only, as JSON has them."""
        return {"phases": [asdict(phase) for phase in self.phases]}

    @classmethod
    def from_dict(cls, saved: Any) -> Ledger:
        """Reads the result of `to_dict`.

        Args:
            saved: The dict.

        Raises:
            ArgumentError: `saved` is not such a dict.
        """
        try:
            phases = saved["phases"]
            if not isinstance(phases, (list, tuple)):
                raise TypeError("`phases` must be a list")
            return cls(tuple(Phase(**phase) for phase in phases))
        except (TypeError, KeyError) as error:
            raise ArgumentError(
                f"A ledger must be read from a result of `Ledger.to_dict`. Received: {saved!r} "
                f"({error}). Write the ledger again with `to_dict`."
            ) from None


def most_within(cost: Callable[[int], float], max_epsilon: float, most_steps: int) -> int:
    """Counts how many steps stay within a budget.

    Args:
        cost: A function from a number of steps to their epsilon. It must not fall.
        max_epsilon: The budget.
        most_steps: The most steps.
    """

    def gap(steps: float) -> float:
        # An infinite epsilon would stop the search.
        return min(cost(round(steps)), 1e9) - max_epsilon

    if gap(0) > 0:
        return 0
    if gap(most_steps) <= 0:
        return most_steps
    from scipy import optimize  # dp-accounting brings it

    # The cost has steps, so the root is right to one or two. The loops below make it exact.
    count: int = round(optimize.brentq(gap, 0, most_steps, xtol=0.5))
    while gap(count) > 0:
        count -= 1
    while gap(count + 1) <= 0:
        count += 1
    return count
