"""Refuses steps on the same data whose costs do not compose."""

from __future__ import annotations

from collections.abc import Sequence

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.phase import CLIENT, EXAMPLE, Phase


def check_relation(phases: Sequence[Phase], relation: str) -> None:
    """Refuses a relation that the accounting of correlated noise does not cover.

    Args:
        phases: The phases of a ledger.
        relation: As in `tfdist.privacy.epsilon`.

    Raises:
        ArgumentError: The relation is not covered.
    """
    if relation == "add_or_remove_one" and any(p.in_turn and p.steps for p in phases):
        raise ArgumentError(
            "`relation` must be 'replace_special' or 'replace_one' for a model that was "
            "trained with DPFTRL: an added example would move all others to other batches. "
            f"Received: relation={relation!r}. Pass one of these to DPSGD, epsilon or "
            "statement."
        )


def check_unit(phases: Sequence[Phase]) -> None:
    """Refuses steps that protect different units: examples, users, clients or other groupings.

    Args:
        phases: The phases of a ledger.

    Raises:
        ArgumentError: The units differ.
    """
    units = {phase.unit for phase in phases if phase.steps}
    if len(units) > 1:
        # One example may change the clipped sum of a user's examples by twice the norm, so
        # steps with users do not protect examples at the same cost.
        raise ArgumentError(
            "All steps on the same data must protect the same unit: examples, users or "
            f"clients. Received: {len(phases)} phases, of {'s and '.join(sorted(units))}s. "
            "Pass `group_ids` always, or never, or FedAvg(privacy=...) always."
        )
    grouped = [p for p in phases if p.steps and (p.unit != EXAMPLE or p.part is not None)]
    groupings = {phase.groups for phase in grouped} - {None}
    sizes_of: dict[int | None, set[int]] = {}
    for phase in grouped:
        if phase.num_rows is not None:
            sizes_of.setdefault(phase.part, set()).add(phase.num_rows)
    sizes = max(sizes_of.values(), key=len, default=set())
    if len(groupings) > 1 or len(sizes) > 1:
        (unit,) = units
        unit = "client" if unit == EXAMPLE else unit
        argument = "clients" if unit == CLIENT else "group_ids"
        raise ArgumentError(
            f"All steps on the same data must have the same `{argument}`: of another "
            f"grouping, a {unit}'s examples lie with several others. Received: "
            f"{max(len(groupings), len(sizes))} groupings. Pass the same `{argument}` "
            "always."
        )
