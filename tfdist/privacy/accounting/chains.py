"""What the phases of a ledger are together: steps that go on from others are one mechanism.

Needs neither TensorFlow nor NumPy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tfdist.privacy.accounting.phase import Phase


def mechanisms(phases: Sequence[Phase]) -> list[Phase]:
    """Joins steps of several processes that are one mechanism.

    Steps whose noise is independent join the ones before if their settings are the same.

    With correlated noise, a training that is resumed, also several times from copies of a
    folder, is a tree: each process draws new noise from the step on at which it goes on,
    and takes back that of the steps before. What it releases is a function of `C g + z` of
    its own steps, where `z` is new, and of what the processes before it have released. So
    all steps of the tree together are a Gaussian mechanism with one coordinate of `C g` for
    each of them, and the square of what an example moves is the sum over any parts that the
    tree is cut into, each at its worst. Long parts are better, since one example is seldom
    the worst in all of them: the longest way from a root is taken first, then the longest
    of what is left, and so on. Of a training without branches that is all of it, as if one
    process had made it.

    Args:
        phases: Of one ledger.

    Returns:
        Phases that cost together what these do; none is without steps.
    """
    made = {i: p for i, p in enumerate(phases) if p.bands is not None and p.steps}
    counts = Counter(phase.run_id for phase in made.values())
    by_name = {p.run_id: i for i, p in made.items() if counts[p.run_id] == 1}
    left = {i: phase.after for i, phase in made.items()}  # where what is not yet cut begins
    found = {i: phase for i, phase in enumerate(phases) if i not in made and phase.steps}
    for last in sorted(made, key=lambda i: -_end(made[i])):
        end, begin, at = _end(made[last]), left[last], last
        if begin >= end:
            continue
        left[last] = end
        while begin == made[at].after:
            before = by_name.get(made[at].continues)
            if before is None or not left[before] < begin <= _end(made[before]):
                break
            if _settings(made[before]) != _settings(made[at]):
                break
            begin, left[before], at = left[before], begin, before
        found[last] = replace(made[last], after=begin, steps=end - begin)
    joined: list[Phase] = []
    for _, phase in sorted(found.items()):
        is_more = bool(joined) and replace(joined[-1], steps=0) == replace(phase, steps=0)
        if is_more and phase.bands is None:
            joined[-1] = replace(phase, steps=joined[-1].steps + phase.steps)
        else:
            joined.append(phase)
    return joined


def _end(phase: Phase) -> int:
    return phase.after + phase.steps


def _settings(phase: Phase) -> Phase:
    return replace(phase, after=0, steps=0)
