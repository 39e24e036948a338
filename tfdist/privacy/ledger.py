"""What private steps were made, and what they cost together.

The numbers are dp-accounting's; this file only says to it what happened.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tfdist.errors import ArgumentError, MissingPackageError
from tfdist.privacy.arguments import check_choice, check_count, check_number
from tfdist.privacy.correlated import banded_norm, sensitivity

ACCOUNTANTS = ("pld", "rdp")
RELATIONS = ("add_or_remove_one", "replace_special", "replace_one")
EXAMPLE, USER = "example", "user"


@dataclass(frozen=True)
class Phase:
    """Steps of DP-SGD made with the same settings.

    In each of them every example is drawn independently with `sampling_probability`
    (Poisson sampling), gradients are clipped one by one, and their sum gets Gaussian noise
    of standard deviation `noise_multiplier` times the norm they were clipped to (Abadi et
    al., "Deep learning with differential privacy", CCS 2016, algorithm 1).

    Args:
        sampling_probability: From 0 to 1: the expected batch size over the examples.
        noise_multiplier: At least 0; without noise nothing is private.
        steps: How many steps, at least 0.
        capacity: The most examples a step takes, or None if there is no limit. When more
            were drawn, a random choice of `capacity` of them stays.
        num_rows: Examples in the data; needed with `capacity`.
        unit: "example", or "user": then a user takes an example's place in all of this, and
            the gradients of a user's examples are added up before they are clipped.
        bands: For correlated noise, `tfdist.DPFTRL`: of how many steps it is; then all
            examples take part in turn, and `sampling_probability` must be 1, unless `cyclic`.
            Such phases do not join: each is a mechanism of its own.
        separation: With `bands`, the steps from one that an example takes part in to the
            next, at least; None if it takes part once.
        cyclic: With `bands`, whether each example is in one of so many groups, which take
            turns: in a step of its group it is drawn with `sampling_probability`
            (`tfdist.DPSGD(bands=)`).
        at_most: Whether `sampling_probability` is the largest of several: examples are drawn
            independently, but some less often than others. It costs as if all had it.
        after: With `bands`, how many steps came before these and are counted elsewhere: these
            took a part of their noise back, and were themselves lost in a crash.
        run_id: Of which training these steps are, random text; steps of the same one are
            counted once by `Ledger.merged`. It makes no phase another one.
        groups: With users, which grouping of the examples they were, random text. It makes
            no phase another one, but different groupings do not compose.

    Raises:
        ArgumentError: A value is out of its range.

    Example:
        >>> Phase(sampling_probability=256 / 60000, noise_multiplier=1.1, steps=14100).steps
        14100
    """

    sampling_probability: float
    noise_multiplier: float
    steps: int
    capacity: int | None = None
    num_rows: int | None = None
    unit: str = EXAMPLE
    bands: int | None = None
    separation: int | None = None
    at_most: bool = False
    after: int = 0
    cyclic: bool = False
    run_id: str = field(default="", compare=False, repr=False)
    groups: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._check_correlated()
        check_choice("unit", self.unit, (EXAMPLE, USER))
        check_number("sampling_probability", self.sampling_probability, 0, 1)
        check_number("noise_multiplier", self.noise_multiplier, 0)
        check_count("steps", self.steps, 0)
        check_count("after", self.after, 0)
        if self.capacity is not None and self.num_rows is None:
            raise ArgumentError(
                "`num_rows` must come with `capacity`: the cost of leaving examples out "
                f"depends on it. Received: capacity={self.capacity!r}, num_rows=None."
            )
        for name in ("capacity", "num_rows"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)

    def _check_correlated(self) -> None:
        for name in ("bands", "separation"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        if self.cyclic and (self.bands is None or self.separation or self.after):
            raise ArgumentError(
                "`cyclic` must come with `bands`, and without `separation` and `after`. "
                f"Received: bands={self.bands!r}, separation={self.separation!r}, "
                f"after={self.after!r}."
            )
        if self.bands is not None and not self.cyclic and self.sampling_probability != 1:
            raise ArgumentError(
                "`sampling_probability` must be 1 with `bands`: nothing is sampled. Received: "
                f"sampling_probability={self.sampling_probability!r}."
            )

    @property
    def truncates(self) -> bool:
        """Whether more examples may be drawn than the capacity takes."""
        return (
            self.capacity is not None
            and self.num_rows is not None
            and self.capacity < self.num_rows
        )

    @property
    def independent(self) -> tuple[float, int]:
        """The noise and the number of Poisson sampled Gaussian mechanisms that these are.

        As many as there are steps, and of `cyclic` ones as many as a group has: an example's
        columns have no row in common, so given the past each step depends on one coin alone
        (Choquette-Choo et al., "(Amplified) banded matrix factorization", NeurIPS 2023,
        theorem 4).
        """
        if not self.cyclic:
            return self.noise_multiplier, self.steps
        assert self.bands is not None
        return self.noise_multiplier / banded_norm(self.bands), -(-self.steps // self.bands)

    @property
    def gaussian_square(self) -> float:
        """What these steps add to the square of a Gaussian mechanism's mean over deviation.

        0 where examples are sampled, which makes them no Gaussian mechanism.
        """
        if self.bands is not None and not self.cyclic:
            return (
                sensitivity(self.bands, self.separation, self.steps) / self.noise_multiplier
            ) ** 2
        if self.sampling_probability < 1 or self.truncates:
            return 0.0
        noise, times = self.independent
        return times / noise**2

    def event(self, *, truncated: bool = True) -> Any:
        """Gives dp-accounting's description of these steps.

        Args:
            truncated: Whether the capacity counts.
        """
        dp = dp_accounting()
        noise, times = self.independent
        if self.bands is not None and not self.cyclic:
            once = sensitivity(self.bands, self.separation, self.steps, self.after)
            return dp.GaussianDpEvent(self.noise_multiplier / once)
        if truncated and self.truncates:
            # The cost is proven in Ganesh et al., arXiv 2508.15089.
            one = dp.TruncatedSubsampledGaussianDpEvent(
                self.num_rows,
                self.sampling_probability,
                self.capacity,
                self.noise_multiplier,
            )
        else:
            gaussian = dp.GaussianDpEvent(noise)
            one = dp.PoissonSampledDpEvent(self.sampling_probability, gaussian)
        return dp.SelfComposedDpEvent(one, times)


@dataclass(frozen=True)
class Ledger:
    """All private steps that were made on the same data, in the order they were made.

    A ledger does not change: `add` gives another one. Whatever released something about
    the data must be in it: several calls of `fit`, a run that was resumed, another batch
    size or another noise.

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
    """

    phases: tuple[Phase, ...] = ()

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
        in_turn = any(p.bands and p.steps and not p.cyclic for p in self.phases)
        if relation == "add_or_remove_one" and in_turn:
            raise ArgumentError(
                "`relation` must be 'replace_special' or 'replace_one' for a model that was "
                "trained by DPFTRL: an example more would move all others to other batches. "
                f"Received: relation={relation!r}. Pass one of these to DPSGD, epsilon or "
                "statement."
            )

    def check_unit(self) -> None:
        """Refuses steps of which some protect examples, and some users.

        Raises:
            ArgumentError: There are such.
        """
        units = {phase.unit for phase in self.phases if phase.steps}
        if len(units) > 1:
            # Of a clipped sum of a user's examples, one of them may change twice the norm.
            raise ArgumentError(
                "All steps on the same data must protect the same: examples or users. "
                f"Received: {len(self.phases)} phases, of {' and '.join(sorted(units))}s. "
                "Pass `group_ids` always, or never."
            )
        of_users = [p for p in self.phases if p.steps and p.unit == USER]
        groupings = {phase.groups for phase in of_users} - {None}
        sizes = {phase.num_rows for phase in of_users} - {None}
        if len(groupings) > 1 or len(sizes) > 1:
            raise ArgumentError(
                "All steps on the same data must have the same `group_ids`: of another "
                "grouping, a user's examples lie with several others. Received: "
                f"{max(len(groupings), len(sizes))} groupings. Pass the same `group_ids` "
                "always."
            )

    def add(self, phase: Phase) -> Ledger:
        """Gives the ledger with more steps in it.

        Args:
            phase: The steps; they join the last ones where the settings are the same.
        """
        if not phase.steps:
            return self
        joins = phase.bands is None and self.phases and _is_alike(self.phases[-1], phase)
        if joins:
            joined = replace(phase, steps=self.phases[-1].steps + phase.steps)
            return Ledger((*self.phases[:-1], joined))
        return Ledger((*self.phases, phase))

    def merged(self, other: Ledger) -> Ledger:
        """Gives the ledger with what another one has beyond it.

        Of steps that both have, of the same training with the same settings, the larger number
        counts: both may have been taken from one history, at different times.

        Args:
            other: Steps on the same data.
        """
        own, missing = Counter(map(_identity, self.phases)), []
        own_steps, their_steps = self._steps_of(), other._steps_of()
        for phase in other.phases:
            key = _identity(phase)
            if phase.bands is not None and not phase.run_id:  # each is a mechanism of its own
                own[key] -= 1
                if own[key] < 0:
                    missing.append(phase)
                continue
            more = their_steps.pop(key, 0) - own_steps.get(key, 0)
            if more <= 0:
                continue
            if phase.bands is not None and key in own_steps:  # one mechanism, that grew
                others = tuple(p for p in self.phases if _identity(p) != key)
                self = Ledger((*others, replace(phase, steps=own_steps[key] + more)))
                continue
            missing.append(replace(phase, steps=more))
        found = self
        for phase in missing:
            found = found.add(phase)
        return found

    def without(self, run_id: str) -> Ledger:
        """Gives the ledger without the steps of a training.

        Args:
            run_id: As in `Phase`.
        """
        return Ledger(tuple(p for p in self.phases if p.run_id != run_id))

    def _steps_of(self) -> dict[Any, int]:
        found: Counter[Any] = Counter()
        for phase in self.phases:
            found[_identity(phase)] += phase.steps
        return dict(found)

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
        made = [phase for phase in self.phases if phase.bands is not None and phase.steps]
        for phase in self.phases:
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
        from tfdist.privacy import accountants

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
    def from_dict(cls, saved: dict[str, Any]) -> Ledger:
        """Makes a ledger of what `to_dict` gave.

        Args:
            saved: The dict.

        Raises:
            ArgumentError: It is none.
        """
        try:
            return cls(tuple(Phase(**phase) for phase in saved["phases"]))
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


def _is_alike(one: Phase, other: Phase) -> bool:
    return (replace(one, steps=0), one.run_id, one.groups) == (
        replace(other, steps=0), other.run_id, other.groups,
    )  # fmt: skip


def _identity(phase: Phase) -> Any:
    """Gives what phases of one history have in common, however many steps were made."""
    is_alone = phase.bands is not None and not phase.run_id
    return replace(phase, steps=phase.steps if is_alone else 0), phase.run_id


def dp_accounting() -> Any:
    """Imports Google's accountant.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        import dp_accounting as found
    except ImportError as error:
        raise MissingPackageError(
            "Privacy accounting must have the package dp-accounting. Received: "
            f'{error}. Install it with: pip install "tfdist[privacy]"'
        ) from None
    return found
