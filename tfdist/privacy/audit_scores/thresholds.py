"""An attack with one threshold of the scores, and the epsilon that its success implies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfdist.privacy.audit_scores.bounds import clopper_pearson

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ThresholdAttack:
    """An attack that guesses "member" above a threshold, or "non-member" below it.

    Attributes:
        threshold: The threshold, chosen on one half of the scores.
        says_member: Whether the attack guesses "member" above the threshold. Otherwise it
            guesses "non-member" below the threshold.
        right: The confidence interval of the probability of a guess for an example for which
            it is right, from the other half of the scores.
        wrong: The same interval for examples for which the guess is wrong.
        epsilon: max(0, ln((right[0] - delta) / wrong[1])), the least epsilon that allows both.
    """

    threshold: float
    says_member: bool
    right: tuple[float, float]
    wrong: tuple[float, float]
    epsilon: float


def best_threshold(
    members: Floats,
    non_members: Floats,
    thresholds: Floats,
    says_member: bool,
    delta: float,
    confidence: float,
) -> ThresholdAttack:
    """Measures attacks with several thresholds, and returns the best one.

    Args:
        members: The scores of members.
        non_members: The scores of non-members.
        thresholds: The thresholds.
        says_member: As in `ThresholdAttack`.
        delta: As in `AuditReport.threshold_attack`.
        confidence: As in `AuditReport.threshold_attack`.
    """

    def speaks_up(scores: Floats) -> tuple[Floats, Floats]:
        below = np.searchsorted(np.sort(scores), thresholds, "left")
        count = len(scores) - below if says_member else below
        return clopper_pearson(count, len(scores), confidence)

    right, wrong = map(
        speaks_up, (members, non_members) if says_member else (non_members, members)
    )
    with np.errstate(divide="ignore"):
        implied = np.log(np.maximum(right[0] - delta, 0.0)) - np.log(wrong[1])
    best = int(implied.argmax())
    return ThresholdAttack(
        float(thresholds[best]),
        says_member,
        (float(right[0][best]), float(right[1][best])),
        (float(wrong[0][best]), float(wrong[1][best])),
        max(0.0, float(implied[best])),
    )
