"""Describes private steps in plain words. Needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tfdist.privacy.accounting.ledger import CLIENT, EXAMPLE, USER, Ledger, Phase

MOST_LISTED = 3  # phases that are described one by one


def public(ledger: Ledger) -> str:
    """Says what is assumed to be public.

    Args:
        ledger: The steps.
    """
    if ledger.unit == CLIENT:
        same = " All rounds are assumed to have had the same `clients`."
        remark = same if len(ledger.phases) > 1 else ""
        return f"The number of clients is assumed to be public.{remark}"
    if ledger.unit == USER:
        remark = (
            ""
            if len(ledger.phases) < 2
            else " All steps are assumed to have had the same `group_ids`."
        )
        return f"The numbers of examples and of users are assumed to be public.{remark}"
    if ledger.parts:
        return (
            "The number of clients, and of the examples of each, is assumed to be public, and "
            "each example to lie with the same client in all steps."
        )
    if any(phase.at_most for phase in ledger.phases):
        return (
            "The number of examples is assumed to be public, and so is what else the "
            "probability of drawing an example follows from, such as the size of each class."
        )
    return "The number of examples is assumed to be public."


def dearest(ledger: Ledger, delta: float, accountant: str, relation: str) -> Ledger:
    """Returns the steps of the client whose examples are protected least.

    Args:
        ledger: The steps of all clients.
        delta: As in `statement`.
        accountant: As in `statement`.
        relation: As in `statement`.
    """
    candidates = ledger.dearest()
    if len(candidates) == 1:
        return candidates[0]
    options: Any = {"accountant": accountant, "relation": relation, "coarse": True}
    return max(candidates, key=lambda candidate: candidate.epsilon(delta, **options))


def of_clients(ledger: Ledger) -> list[str]:
    """Says that each client makes steps of its own, if that is so.

    Args:
        ledger: The steps of all clients.
    """
    if not ledger.parts:
        return []
    return [
        f"These are the steps of the client with the largest epsilon of {len(ledger.parts)}: "
        "each makes its steps on its own examples alone, with noise of its own, and what the "
        "clients send is computed from them."
    ]


def described(ledger: Ledger) -> str:
    """Describes steps.

    Args:
        ledger: Steps in which the same examples may have taken part.
    """
    if not ledger.steps:
        return "no step at all"
    mechanisms = ledger.mechanisms
    if len(mechanisms) <= MOST_LISTED:
        return ", then ".join(map(_describe, mechanisms))
    # A schedule has many phases that differ only in their noise. They are described together.
    groups: dict[Any, list[Phase]] = {}
    for number, phase in enumerate(mechanisms):
        plain = replace(phase, steps=0, noise_multiplier=0.0)
        groups.setdefault(number if phase.bands else plain, []).append(phase)
    return ", then ".join(_describe(phases[0], phases) for phases in groups.values())


def _describe(phase: Phase, group: Sequence[Phase] = ()) -> str:
    limit = "" if phase.capacity is None else f", at most {phase.capacity} of them kept"
    if phase.cyclic:
        return (
            f"{phase.steps} steps of DP-SGD with correlated noise, each example in one of "
            f"{phase.bands} groups that take turns and drawn into each step of its group "
            f"independently with probability {phase.sampling_probability:.6g}, each example's "
            "gradient clipped to a norm C, and Gaussian noise of standard deviation "
            f"{phase.noise_multiplier:.6g} C for each step, of which later steps take a part "
            "back"
        )
    if phase.bands is not None:
        often = "takes part in no more than one of them"
        if phase.separation is not None:
            often = f"comes in steps that are at least {phase.separation} apart"
        resumed = "" if not phase.after else f" that went on after {phase.after} others"
        if phase.unit == CLIENT:
            return (
                f"{phase.steps} rounds of DP-FTRL{resumed}, each client's update clipped to a "
                f"norm C, in which a client {often.replace('steps', 'rounds')}, and Gaussian "
                f"noise of standard deviation {phase.noise_multiplier:.6g} C for each round, "
                f"of which the {phase.bands - 1} rounds after it take a part back"
            )
        return (
            f"{phase.steps} steps of DP-FTRL{resumed}, each example's gradient clipped to a "
            f"norm C, in which an example {often}, and Gaussian noise of standard deviation "
            f"{phase.noise_multiplier:.6g} C for each step, of which the {phase.bands - 1} "
            "steps after it take a part back"
        )
    at_most = "at most " if phase.at_most else ""
    clipped = "gradient" if phase.unit == EXAMPLE else "gradients added up and"
    noise = f"{phase.noise_multiplier:.6g} C"
    if len(group) > 1:
        noises = sorted({p.noise_multiplier for p in group})
        noise = f"{noises[0]:.6g} to {noises[-1]:.6g} C, {len(noises)} values in all,"
    steps = sum(p.steps for p in group) or phase.steps
    if phase.unit == CLIENT:
        return (
            f"{steps} rounds of federated averaging, each client drawn into each round "
            f"independently with probability {phase.sampling_probability:.6g}, each client's "
            f"update clipped to a norm C, and Gaussian noise of standard deviation {noise} "
            "added to their sum"
        )
    return (
        f"{steps} steps of DP-SGD, each {phase.unit} drawn into each step independently "
        f"with probability {at_most}{phase.sampling_probability:.6g}{limit}, each "
        f"{phase.unit}'s {clipped} clipped to a norm C, and Gaussian noise of standard "
        f"deviation {noise} added to their sum"
    )
