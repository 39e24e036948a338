"""Which steps on the same data have a cost together."""

from __future__ import annotations

from collections.abc import Sequence

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.phase import USER, Phase


def check_relation(phases: Sequence[Phase], relation: str) -> None:
    """Refuses a relation under which correlated noise has another cost.

    Args:
        phases: Of one ledger.
        relation: As in `tfdist.privacy.epsilon`.

    Raises:
        ArgumentError: It is one.
    """
    if relation == "add_or_remove_one" and any(p.in_turn and p.steps for p in phases):
        raise ArgumentError(
            "`relation` must be 'replace_special' or 'replace_one' for a model that was "
            "trained by DPFTRL: an example more would move all others to other batches. "
            f"Received: relation={relation!r}. Pass one of these to DPSGD, epsilon or "
            "statement."
        )


def check_unit(phases: Sequence[Phase]) -> None:
    """Refuses steps of which some protect examples, and some users, or others' examples.

    Args:
        phases: Of one ledger.

    Raises:
        ArgumentError: There are such.
    """
    units = {phase.unit for phase in phases if phase.steps}
    if len(units) > 1:
        # Of a clipped sum of a user's examples, one of them may change twice the norm.
        raise ArgumentError(
            "All steps on the same data must protect the same: examples or users. "
            f"Received: {len(phases)} phases, of {' and '.join(sorted(units))}s. "
            "Pass `group_ids` always, or never."
        )
    of_users = [p for p in phases if p.steps and p.unit == USER]
    groupings = {phase.groups for phase in of_users} - {None}
    sizes = {phase.num_rows for phase in of_users} - {None}
    if len(groupings) > 1 or len(sizes) > 1:
        raise ArgumentError(
            "All steps on the same data must have the same `group_ids`: of another "
            "grouping, a user's examples lie with several others. Received: "
            f"{max(len(groupings), len(sizes))} groupings. Pass the same `group_ids` "
            "always."
        )
