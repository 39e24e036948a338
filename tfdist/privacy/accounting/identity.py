"""Decides which steps of two ledgers are the same, by the rule of `Ledger`."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from tfdist.privacy.accounting.phase import Phase

_BY_HAND = "by hand "


def named(phase: Phase) -> Phase:
    """Names a phase that was made by hand, with a name that no other phase has.

    Args:
        phase: Any phase.
    """
    return phase if phase.run_id else replace(phase, run_id=_BY_HAND + secrets.token_hex(8))


def run_of(phase: Phase) -> Any:
    """Returns a key that phases of one run share, whatever their number of steps.

    Args:
        phase: Any phase.
    """
    return replace(phase, steps=0), phase.run_id


def union(first: Iterable[Phase], second: Iterable[Phase]) -> tuple[Phase, ...]:
    """Returns the steps of two ledgers, each once.

    Phases of a run stand for the first steps of the run. So the larger number of steps covers
    both ledgers.

    Args:
        first: The phases of one ledger.
        second: The phases of the other one.
    """
    union_phases = list(first)
    first_by_run, second = _by_run(union_phases), list(second)
    for run, numbers in _by_run(second).items():
        phases, places = [second[i] for i in numbers], first_by_run.get(run, [])
        if not places:
            union_phases += phases
        elif phases[0].bands is None:
            additional = sum(p.steps for p in phases) - sum(
                union_phases[i].steps for i in places
            )
            last = union_phases[places[-1]]
            union_phases[places[-1]] = replace(last, steps=last.steps + max(0, additional))
        else:
            # Phases with correlated noise do not join: each is a mechanism. Several of one run
            # exist only if a user gave them the same `run_id`. The longest ones are paired.
            places = sorted(places, key=lambda i: -union_phases[i].steps)
            phases = sorted(phases, key=lambda p: -p.steps)
            for place, phase in zip(places, phases, strict=False):
                union_phases[place] = max(union_phases[place], phase, key=lambda p: p.steps)
            union_phases += phases[len(places) :]
    return tuple(phase for phase in union_phases if phase.steps)


def _by_run(phases: Sequence[Phase]) -> dict[Any, list[int]]:
    """Groups the numbers of phases by run."""
    numbers: dict[Any, list[int]] = {}
    for number, phase in enumerate(phases):
        numbers.setdefault(run_of(phase), []).append(number)
    return numbers


def same_made_again(phases: Iterable[Phase], earlier: Iterable[Phase]) -> dict[str, str]:
    """Matches phases made by hand with equal phases that another process made by hand.

    A script that is started again makes its phases again, and means the same steps.

    Args:
        phases: The phases of this process.
        earlier: The phases of the other process, from the same place in the script.

    Returns:
        The names in the other process by the names in this one.
    """
    phases, earlier = list(phases), list(earlier)
    names_here, names_there = ({p.run_id for p in some} for some in (phases, earlier))
    # A phase that both processes know by name is the same one, and matched already.
    free = [p for p in earlier if p.run_id.startswith(_BY_HAND) and p.run_id not in names_here]
    names: dict[str, str] = {}
    for phase in phases:
        is_new = phase.run_id.startswith(_BY_HAND) and phase.run_id not in names_there
        if is_new and phase in free:
            names[phase.run_id] = free.pop(free.index(phase)).run_id
    return names


def like_steps(spent: Sequence[Phase], all_phases: Sequence[Phase]) -> str | None:
    """Warns of phases made by hand that equal other phases, and are counted besides them.

    Args:
        spent: The phases that the user passed.
        all_phases: All phases that are counted.
    """
    names = {phase.run_id for phase in spent}
    repeated = same_made_again(spent, [p for p in all_phases if p.run_id not in names])
    steps = sum(phase.steps for phase in spent if phase.run_id in repeated)
    if not steps:
        return None
    return (
        f"`spent` has {steps} steps that are counted besides {steps} like them, which the "
        "model brings. If they are the same, leave `spent` out."
    )
