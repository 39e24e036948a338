"""The report of a private training: its guarantee in plain words, with its assumptions."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from tfdist.figures import html_table
from tfdist.privacy.accounting.descriptions import dearest, described, of_clients, public
from tfdist.privacy.accounting.ledger import CLIENT, EXAMPLE, USER, Ledger

_ALIKE = {
    "add_or_remove_one": "differ by {}, added or removed",
    "replace_special": "differ in {}, replaced by {} that contributes nothing",
    "replace_one": "differ in {}, replaced by any other",
}
_ONE = {
    EXAMPLE: ("one example", "one"),
    USER: ("all examples of one user", "a user"),
    CLIENT: ("all examples of one client", "a client"),
}
_WHOM = {
    EXAMPLE: "This holds for one example of the data, not for a person who contributed "
    "several.",
    USER: "This holds for all examples together that `group_ids` gave to one user, not for a "
    "person with several ids.",
    CLIENT: "This holds for all examples together of one client, and so for each of them, not "
    "for a person whose examples lie with several clients.",
}
_LARGE = 10  # the last tier of Ponomareva et al., "How to DP-fy ML", 2023, begins here
_FLOATS = (
    "tfdist adds noise in float64, up to 9.49 standard deviations, of 96 random bits for two "
    "numbers, and rounds the sums to a grid that does not depend on the data before anything "
    "reads them. "
    "Gradients, their norms and their sums before that are of float32; that their rounding may "
    "move a sum by a little more than C is not counted."
)
_SECRET = {True: "{}s were drawn and noise was", False: "noise was"}
_METHODS = {
    "pld": "privacy loss distributions, those of single steps from dp-accounting",
    "rdp": "Rényi divergences, with dp-accounting",
}


@dataclass(frozen=True)
class Report:
    """The privacy that a `fit` has spent, as in `history.privacy`.

    Attributes:
        ledger: All private steps on the data: of this `fit`, of earlier `fit`s of the model,
            and those in `DPSGD.spent`.
        delta: As in `tfdist.DPSGD`.
        accountant: As in `tfdist.DPSGD`.
        relation: As in `tfdist.DPSGD`.
        secret: Whether all random numbers came from the operating system. Otherwise there is no
            guarantee.
        uncounted_steps: The updates that the optimizer had made before or between the private
            steps, as far as they are known. They may have used these data.
        changes: How often the weights were changed between private steps without being counted,
            for example by setting them.
        validated_inside: Whether validation used protected data.
        norm_changes: Whether the clipping norm followed a schedule.
    """

    ledger: Ledger
    delta: float
    accountant: str = "pld"
    relation: str = "add_or_remove_one"
    secret: bool = True
    uncounted_steps: int = 0
    changes: int = 0
    validated_inside: bool = False
    norm_changes: bool = False

    @functools.cached_property
    def epsilon(self) -> float:
        """The epsilon of all steps together. It takes seconds to compute."""
        return self.ledger.epsilon(
            self.delta, accountant=self.accountant, relation=self.relation
        )

    def statement(self) -> str:
        """Returns a paragraph in plain words; see `tfdist.privacy.statement`."""
        text = statement(
            self.ledger, delta=self.delta, accountant=self.accountant, relation=self.relation
        )
        introduction = [_SEEDED] if self.ledger.secret and not self.secret else []
        remarks = [_INSIDE] if self.validated_inside else []
        if self.norm_changes:
            remarks.append(_MOVING)
        if self.uncounted_steps:
            remarks.append(
                f"The optimizer had made {self.uncounted_steps} updates before, or between "
                "private steps, which are not counted: they must not have seen these data."
            )
        if self.changes:
            remarks.append(
                "Between private steps the weights were changed by something that is not "
                f"counted ({self.changes} times): it must not have seen these data."
            )
        return " ".join([*introduction, text, *remarks])

    def _repr_html_(self) -> str:
        units = {CLIENT: "rounds"}.get(self.ledger.unit, "steps")
        whom = f"each {self.ledger.unit}"
        if self.ledger.parts:
            whom += f", by each of {len(self.ledger.parts)} clients; the largest epsilon"
        rows = [
            ("epsilon", "none" if math.isinf(self.epsilon) else _rounded_up(self.epsilon)),
            ("delta", f"{self.delta:g}"),
            (units, f"{self.ledger.steps:,}"),
            ("protected", whom),
        ]
        if not self.secret:
            rows.append(("guarantee", "none: a seed was given"))
        return html_table(("privacy", ""), rows, below=self.statement())

    def line(self, within: float | None = None) -> str:
        """Returns a summary in one line. Its epsilon may be some tenths of a percent too large.

        Args:
            within: The target epsilon, or None. If the coarse epsilon is above the target, it
                is computed exactly.
        """
        epsilon = self.ledger.epsilon(
            self.delta, accountant=self.accountant, relation=self.relation, coarse=True
        )
        # The coarse bound may be above a target that the training keeps.
        if within is not None and epsilon > within:
            epsilon = self.epsilon
        unit = self.ledger.unit
        steps = "rounds" if unit == CLIENT else "steps"
        if math.isinf(epsilon):
            spent = f"no privacy, {self.ledger.steps} {steps} without noise"
        else:
            spent = (
                f"epsilon {_rounded_up(epsilon)} at delta {self.delta:g} spent in "
                f"{self.ledger.steps} {steps}"
            )
            if unit != EXAMPLE:
                spent += f", for each {unit}"
            if self.ledger.parts:
                spent += f" of a client, the largest of {len(self.ledger.parts)} clients"
            if epsilon > _LARGE:
                spent += f"; an epsilon above {_LARGE} promises little"
        if self.uncounted_steps or self.changes:
            spent += "; other training of the weights is not counted"
        return spent if self.secret else f"{spent}, with no guarantee: a seed was given"


_SEEDED = (
    "There is no guarantee, since sampling or noise came from a seed that was given: who knows "
    "it can undo both. Were they secret, this would hold:"
)
_INSIDE = (
    "Validation was on rows of the data that are protected, or on rows held out from them: its "
    "losses and metrics are exact, and must be kept as the data are."
)

_MOVING = (
    "The norm C followed a schedule that was fixed before training, and the noise with it."
)


def statement(
    ledger: Ledger,
    *,
    delta: float,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
    num_rows: int | None = None,
) -> str:
    """Describes the guarantee of a ledger and its assumptions in plain words.

    Args:
        ledger: All private steps that were made on the data.
        delta: As in `tfdist.privacy.epsilon`.
        accountant: As in `tfdist.privacy.epsilon`.
        relation: As in `tfdist.privacy.epsilon`.
        num_rows: The number of examples, or of users, in the data, to check `delta` against it.
            None takes it from the ledger.

    Returns:
        A paragraph without line breaks.

    Raises:
        ArgumentError: As in `Ledger.epsilon`.
        MissingPackageError: As in `Ledger.epsilon`.

    Example:
        >>> import tfdist
        >>> phase = tfdist.privacy.Phase(
        ...     sampling_probability=0.01, noise_multiplier=4.0, steps=10000
        ... )
        >>> text = tfdist.privacy.statement(tfdist.privacy.Ledger((phase,)), delta=1e-5)
        >>> text[:71]
        'The weights are differentially private with epsilon = 0.947 and delta ='
    """
    spent = ledger.epsilon(delta, accountant=accountant, relation=relation)
    if math.isinf(spent):
        return (
            "The weights are not differentially private: at least one step was made without "
            "noise."
        )
    unit = ledger.unit
    sampled = any(phase.bands is None or phase.cyclic for phase in ledger.phases)
    alike = _ALIKE[relation].format(*_ONE[unit])
    sentences = [
        *([] if ledger.secret else [_SEEDED]),
        f"The weights are differentially private with epsilon = {_rounded_up(spent)} and "
        f"delta = {delta:g}: for any two data sets that {alike}, whatever can be "
        f"concluded from the weights is at most e^epsilon = {_rounded_up(math.exp(spent))} "
        "times as likely with the one as with the other, but for an additional probability of "
        "delta."
        if spent < 100
        else f"The weights have epsilon = {_rounded_up(spent)} at delta = {delta:g}, for data "
        f"sets that {alike}. An epsilon so large protects nobody.",
        _WHOM[unit],
        f"The weights came from {described(dearest(ledger, delta, accountant, relation))}.",
        *of_clients(ledger),
        f"Epsilon was computed by {_METHODS[accountant]}.",
        "It holds for the weights of every step, the optimizer's state and whatever is "
        "computed from them, so all of them may be released.",
        f"It assumes that {_SECRET[sampled].format(unit)} made from random numbers nobody "
        "can predict or repeat, that no other step was made on these data, and that choices "
        "made by looking at the data (the model, its settings, the preprocessing) are not "
        "counted.",
        public(ledger),
        "Losses and metrics, such as those in `History`, in logs and in progress bars, got no "
        "noise, those of validation neither: they do not protect the rows that they are of. "
        "Choices by validation (when to stop, which settings to take) are covered only if its "
        "data need no protection.",
        _FLOATS,
    ]
    careless = careless_delta(ledger, delta, num_rows)
    return " ".join([*sentences, careless] if careless else sentences)


def careless_delta(ledger: Ledger, delta: float, num_rows: int | None = None) -> str | None:
    """Returns a warning if `delta` is too large for the data, else None.

    Args:
        ledger: The steps.
        delta: As in `statement`.
        num_rows: As in `statement`.
    """
    sizes: dict[int | None, int] = {}
    for phase in ledger.phases:
        sizes[phase.part] = max(sizes.get(phase.part, 0), phase.num_rows or 0)
    of_all = sizes.pop(None, 0)
    rows = num_rows or max(of_all, sum(sizes.values()))
    if delta * rows < 1:
        return None
    return (
        f"delta is not below 1 / {rows}, one over the number of {ledger.unit}s: giving away a "
        f"random {ledger.unit} would satisfy this guarantee."
    )


def _rounded_up(value: float) -> str:
    """Rounds up to three digits."""
    if value == 0:
        return "0"
    # Up, since a smaller number would promise more than is true.
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit - 1e-9) * unit:.3g}"
