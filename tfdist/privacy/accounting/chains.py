"""Joins the phases of a ledger into mechanisms. Steps that continue others are one mechanism.

Needs neither TensorFlow nor NumPy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tfdist.privacy.accounting.phase import Phase


def mechanisms(phases: Sequence[Phase]) -> list[Phase]:
    """Joins steps of several processes that are one mechanism.

    Steps with independent noise join the steps before them if their settings are equal.

    With correlated noise, a training that is resumed, possibly several times from copies of a
    folder, is a tree. Each process draws new noise from its first step on, and subtracts noise
    of the steps before it. Its release is a function of `C g + z` of its own steps, where `z`
    is new, and of the releases of the processes before it. So all steps of the tree together
    are a Gaussian mechanism with one coordinate of `C g` for each step. The tree may be cut
    into any parts: the squared sensitivity is at most the sum of the parts' squared
    sensitivities. Long parts give a better bound, since one example is seldom the worst in all
    parts. So the longest path from a root is taken first, then the longest remaining one, and
    so on. A training without branches is a single part, as if one process had made it.

    Args:
        phases: The phases of a ledger.

    Returns:
        Phases that together cost as much as `phases`. All of them have steps.
    """
    correlated = {i: p for i, p in enumerate(phases) if p.bands is not None and p.steps}
    counts = Counter(phase.run_id for phase in correlated.values())
    by_name = {p.run_id: i for i, p in correlated.items() if counts[p.run_id] == 1}
    # For each phase the first step that is in no part yet.
    begins = {i: phase.after for i, phase in correlated.items()}
    parts = {i: phase for i, phase in enumerate(phases) if i not in correlated and phase.steps}
    for last in sorted(correlated, key=lambda i: -_end(correlated[i])):
        end, begin, current = _end(correlated[last]), begins[last], last
        if begin >= end:
            continue
        begins[last] = end
        # The part is extended to the phases that its steps continue, towards the root.
        while begin == correlated[current].after:
            parent = by_name.get(correlated[current].continues)
            if parent is None or not begins[parent] < begin <= _end(correlated[parent]):
                break
            if _settings(correlated[parent]) != _settings(correlated[current]):
                break
            begin, begins[parent], current = begins[parent], begin, parent
        parts[last] = replace(correlated[last], after=begin, steps=end - begin)
    joined: list[Phase] = []
    for _, phase in sorted(parts.items()):
        is_equal = bool(joined) and replace(joined[-1], steps=0) == replace(phase, steps=0)
        if is_equal and phase.bands is None:
            joined[-1] = replace(phase, steps=joined[-1].steps + phase.steps)
        else:
            joined.append(phase)
    return joined


def _end(phase: Phase) -> int:
    return phase.after + phase.steps


def _settings(phase: Phase) -> Phase:
    return replace(phase, after=0, steps=0)
