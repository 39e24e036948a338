"""Steps that used disjoint parts of the examples, and cost as much as the worst part does.

If each client makes private steps of its own, with noise of its own, an example takes part in
the steps of its client alone. All other steps are computed from what was released. So the cost
is that of the client whose steps cost most (McSherry, "Privacy integrated queries", SIGMOD
2009, theorem 4: parallel composition). Steps on all examples are steps of each part.

Needs neither TensorFlow nor NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tfdist.privacy.accounting.phase import Phase


def of_part(phases: Sequence[Phase], part: int | None) -> tuple[Phase, ...]:
    """Returns the steps in which the examples of a part may have taken part.

    Args:
        phases: The phases of a ledger.
        part: As in `Phase`. None is an example that lies in no part.
    """
    return tuple(phase for phase in phases if phase.part in (None, part))


def parts_of(phases: Sequence[Phase]) -> list[int]:
    """Lists the parts that have steps of their own.

    Args:
        phases: The phases of a ledger.
    """
    return sorted({p.part for p in phases if p.part is not None and p.steps})


def most_steps(phases: Sequence[Phase]) -> int:
    """Returns the most steps in which one example may have taken part.

    Args:
        phases: The phases of a ledger.
    """
    of_all = sum(phase.steps for phase in phases if phase.part is None)
    of_parts: dict[int, int] = {}
    for phase in phases:
        if phase.part is not None:
            of_parts[phase.part] = of_parts.get(phase.part, 0) + phase.steps
    return of_all + max(of_parts.values(), default=0)


def dearest(phases: Sequence[Phase]) -> list[tuple[Phase, ...]]:
    """Returns the steps of each part that may cost most.

    Parts are left out whose steps are those of another part with smaller probabilities and no
    more steps. They do not cost more: a smaller probability mixes both sides of each pair of
    distributions with the same third one, and divergences are jointly convex.

    Args:
        phases: The phases of a ledger.
    """
    parts = parts_of(phases)
    if not parts:
        return [tuple(phases)]
    own: dict[int, list[Phase]] = {part: [] for part in parts}
    for phase in phases:
        if phase.part is not None and phase.steps:
            own[phase.part].append(phase)
    # The largest first, so that few are compared with many.
    distinct = {tuple(_costs(p) for p in own[part]): part for part in reversed(parts)}
    front: list[tuple[Phase, ...]] = []
    kept: list[int] = []
    for steps, part in sorted(distinct.items(), key=lambda item: _size(item[0]), reverse=True):
        if not any(_is_within(steps, other) for other in front):
            front.append(steps)
            kept.append(part)
    return [of_part(phases, part) for part in sorted(kept)]


def _costs(phase: Phase) -> Phase:
    """Returns a phase without what makes no difference to its cost."""
    rows = phase.num_rows if phase.truncates else None
    limit = phase.capacity if phase.truncates else None
    return replace(phase, part=None, num_rows=rows, capacity=limit)


def _size(phases: Sequence[Phase]) -> tuple[float, ...]:
    return tuple(v for phase in phases for v in (phase.sampling_probability, phase.steps))


def _is_within(phases: Sequence[Phase], others: Sequence[Phase]) -> bool:
    """Returns whether steps are those of another part, with smaller probabilities."""
    if len(phases) != len(others):
        return False
    return all(
        one.bands is None
        and not one.truncates
        and one.sampling_probability <= other.sampling_probability
        and one.steps <= other.steps
        and replace(one, sampling_probability=other.sampling_probability, steps=other.steps)
        == other
        for one, other in zip(phases, others, strict=True)
    )
