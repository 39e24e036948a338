"""Which steps of two ledgers are the same ones; the rule is `Ledger`'s."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from tfdist.privacy.accounting.phase import Phase

_BY_HAND = "by hand "


def named(phase: Phase) -> Phase:
    """Gives a phase that was made by hand a name that no other one has.

    Args:
        phase: Any phase.
    """
    return phase if phase.run_id else replace(phase, run_id=_BY_HAND + secrets.token_hex(8))


def run_of(phase: Phase) -> Any:
    """Gives what phases of one run have in common, however many steps were made.

    Args:
        phase: Any phase.
    """
    return replace(phase, steps=0), phase.run_id


def union(first: Iterable[Phase], second: Iterable[Phase]) -> tuple[Phase, ...]:
    """Gives the steps that one of two ledgers knows, each once.

    Both know the first steps of a run, so the larger number holds for both.

    Args:
        first: Of one ledger.
        second: Of the other.
    """
    found = list(first)
    own, others = _by_run(found), list(second)
    for run, places in _by_run(others).items():
        theirs, known = [others[i] for i in places], own.get(run, [])
        if not known:
            found += theirs
        elif theirs[0].bands is None:
            more = sum(p.steps for p in theirs) - sum(found[i].steps for i in known)
            last = found[known[-1]]
            found[known[-1]] = replace(last, steps=last.steps + max(0, more))
        else:  # several of one name are a mechanism each, unless the name was chosen badly
            known = sorted(known, key=lambda i: -found[i].steps)
            theirs = sorted(theirs, key=lambda p: -p.steps)
            for place, phase in zip(known, theirs, strict=False):
                found[place] = max(found[place], phase, key=lambda p: p.steps)
            found += theirs[len(known) :]
    return tuple(phase for phase in found if phase.steps)


def _by_run(phases: Sequence[Phase]) -> dict[Any, list[int]]:
    found: dict[Any, list[int]] = {}
    for place, phase in enumerate(phases):
        found.setdefault(run_of(phase), []).append(place)
    return found


def same_made_again(given: Iterable[Phase], known: Iterable[Phase]) -> dict[str, str]:
    """Finds phases made by hand that another process made by hand in the same place.

    A script that is started again makes its phases anew, and means the same steps.

    Args:
        given: Of this process.
        known: What the other one was given where this one was given `given`.

    Returns:
        What they are called there, by what they are called here.
    """
    given, known = list(given), list(known)
    here, there = ({phase.run_id for phase in phases} for phases in (given, known))
    free = [p for p in known if p.run_id.startswith(_BY_HAND) and p.run_id not in here]
    names: dict[str, str] = {}
    for phase in given:
        is_new = phase.run_id.startswith(_BY_HAND) and phase.run_id not in there
        if is_new and phase in free:
            names[phase.run_id] = free.pop(free.index(phase)).run_id
    return names


def like_steps(spent: Sequence[Phase], known: Sequence[Phase]) -> str | None:
    """Says that phases made by hand are like others, and count besides them.

    Args:
        spent: What was given.
        known: All that is known.
    """
    given = {phase.run_id for phase in spent}
    again = same_made_again(spent, [p for p in known if p.run_id not in given])
    steps = sum(phase.steps for phase in spent if phase.run_id in again)
    if not steps:
        return None
    return (
        f"`spent` has {steps} steps that are counted besides {steps} like them, which the "
        "model brings. If they are the same, leave `spent` out."
    )
