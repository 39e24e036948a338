"""The cost of mechanisms together, by the accountants.

Needs no TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tfdist.privacy.accounting.phase import Phase, dp_accounting


def epsilon_of(
    all_phases: Sequence[Phase],
    delta: float,
    accountant: str,
    relation: str,
    coarseness: float,
) -> float:
    """Computes the epsilon of mechanisms in which the same examples took part.

    Args:
        all_phases: The mechanisms; see `chains.mechanisms`.
        delta: As in `tfdist.privacy.epsilon`.
        accountant: As in `tfdist.privacy.epsilon`.
        relation: As in `tfdist.privacy.epsilon`.
        coarseness: As in `accountants.pld_epsilon`.
    """
    steps_of: dict[Phase, int] = {}
    # Each phase with correlated noise is a mechanism of its own. All others with equal
    # settings become one phase, which is composed at once.
    phases = [phase for phase in all_phases if phase.bands is not None]
    for phase in all_phases:
        if phase.bands is None:
            key = replace(phase, steps=0, part=None)
            steps_of[key] = steps_of.get(key, 0) + phase.steps
    phases += [replace(p, steps=n) for p, n in steps_of.items() if n and p.sampling_probability]
    if not phases:
        return 0.0
    if any(phase.noise_multiplier == 0 for phase in phases):
        return math.inf
    # A missing dp-accounting is reported before SciPy, which it depends on.
    dp_accounting()
    from tfdist.privacy.accounting import accountants

    if accountant == "rdp":
        return accountants.rdp_epsilon(phases, delta, relation)
    return accountants.pld_epsilon(phases, delta, relation, coarseness)
