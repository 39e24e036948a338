"""The report of an audit: how well scores separate members, and bounds of epsilon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_number
from tfdist.privacy.accounting.ledger import Ledger
from tfdist.privacy.audit_scores.bounds import epsilon_lower_bound
from tfdist.privacy.audit_scores.plots import plot_scores
from tfdist.privacy.audit_scores.thresholds import ThresholdAttack, best_threshold
from tfdist.privacy.audit_scores.tradeoffs import (
    curve_of_ledger,
    gaussian_epsilon,
    gaussian_lower_bound,
    p_value_of,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_FEWEST_GUESSES = 4
_FEWEST_SCORES = 20


@dataclass(frozen=True, eq=False)
class AuditReport:
    """The report of `tfdist.privacy.audit`: how well members of the data are recognized.

    `auc` and `advantage` describe one attack on one model. They are estimates. An attack that
    fails does not show privacy, since a better attack may succeed. `epsilon_lower_bound` is a
    theorem: it can refute a claimed epsilon, but never confirm it. `threshold_attack` is a
    bound only if each score comes from a separate training. For the scores of one model it is
    an estimate.

    Args:
        scores: Float of shape [examples]. A higher score means a likelier member.
        included: Bool of shape [examples]: whether the example was trained on.
        fair_coins: Whether a fair coin decided for each example whether it was included.

    Raises:
        ArgumentError: A score is NaN, the shapes differ, or there are no members or no
            non-members.

    Example:
        >>> import numpy as np
        >>> from tfdist.privacy import AuditReport
        >>> rng = np.random.default_rng(0)
        >>> included = rng.random(1000) < 0.5
        >>> found = AuditReport(rng.normal(size=1000) + 2 * included, included, fair_coins=True)
        >>> round(found.auc, 2), round(found.advantage, 2)
        (0.92, 0.67)
        >>> round(found.epsilon_lower_bound(delta=1e-5), 1)
        2.9
    """

    scores: Floats
    included: Bools
    fair_coins: bool = False

    def __post_init__(self) -> None:
        scores = np.asarray(self.scores, np.float64)
        included = np.asarray(self.included, bool)
        if scores.ndim != 1 or scores.shape != included.shape:
            raise ArgumentError(
                "`scores` and `included` must have one number for each example. Received: "
                f"shapes {scores.shape} and {included.shape}. Pass both of shape [examples]."
            )
        if np.isnan(scores).any():
            raise ArgumentError(
                "`scores` must be numbers. Received: scores with "
                f"{int(np.isnan(scores).sum())} NaN of {len(scores)}. Check that training has "
                "not diverged."
            )
        if included.all() or not included.any():
            raise ArgumentError(
                f"An audit needs members and non-members. Received: {int(included.sum())} "
                f"members of {len(included)} examples. Pass examples of both kinds."
            )
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "included", included)

    @property
    def members(self) -> Floats:
        """The scores of examples that were trained on."""
        return self.scores[self.included]

    @property
    def non_members(self) -> Floats:
        """The scores of examples that were not trained on."""
        return self.scores[~self.included]

    @property
    def auc(self) -> float:
        """The probability that a member scores above a non-member; 0.5 is chance.

        The area under the ROC curve, equal scores counted half.
        """
        non_members = np.sort(self.non_members)
        below = np.searchsorted(non_members, self.members, "left")
        up_to = np.searchsorted(non_members, self.members, "right")
        return float((below + up_to).mean() / (2 * len(non_members)))

    @property
    def advantage(self) -> float:
        """The largest difference of true and false positive rate, over all thresholds.

        0 is chance and 1 is certainty (Yeom et al., "Privacy risk in machine learning", CSF
        2018). The threshold is chosen on the same scores. So the advantage of random scores is
        above 0, by about 0.9 / sqrt(n) for n members and n non-members.
        """
        false, true = self.roc()
        return float((true - false).max())

    def roc(self) -> tuple[Floats, Floats]:
        """Returns false and true positive rates, for thresholds from the highest down."""
        thresholds = np.unique(self.scores)[::-1]
        rates = [
            1 - np.searchsorted(np.sort(s), thresholds, "left") / len(s)
            for s in (self.non_members, self.members)
        ]
        false, true = (np.concatenate([[0.0], rate]) for rate in rates)
        return false, true

    def true_positive_rate(self, at: float) -> float:
        """Returns the fraction of members that is found at a false positive rate.

        For those members, the fraction that is found almost without error matters (Carlini et
        al., "Membership inference attacks from first principles", S&P 2022).

        Args:
            at: The false positive rate, for example 0.001. Below 1 / non-members it is 0.
        """
        check_number("at", at, 0, 1)
        false, true = self.roc()
        return float(true[false <= at].max())

    def epsilon_lower_bound(
        self,
        delta: float,
        confidence: float = 0.95,
        guesses: tuple[int, int] | None = None,
    ) -> float:
        """Bounds the training's epsilon from below, by `tfdist.privacy.epsilon_lower_bound`.

        The highest scores are guessed to be members, and the lowest to be non-members. No guess
        is made about scores between them. The number of guesses must not depend on their
        success. So either `guesses` is fixed before, or several numbers are tried, each at a
        higher confidence, so that all bounds hold together (Bonferroni's correction).

        Args:
            delta: The delta of the guarantee, between 0 and 1.
            confidence: The probability with which the bound holds, over coins and training.
            guesses: The number of highest and of lowest scores about which a guess is made,
                chosen before looking at the scores. With None, half of the canaries, a
                quarter and so on are tried, at both ends together and at each end alone.

        Returns:
            A number of at least 0: the training cannot be (epsilon, delta)-private for a
            smaller epsilon.

        Raises:
            ArgumentError: The examples were not included by fair coins, or there are more
                guesses than canaries.
            MissingPackageError: SciPy is not installed.
        """
        check_number("confidence", confidence, 0, 1, open_ends=True)
        tried = self._tried(guesses)
        confidence = 1 - (1 - confidence) / len(tried)
        return max(
            epsilon_lower_bound(**counts, delta=delta, confidence=confidence)
            for counts in tried
        )

    def gaussian_lower_bound(
        self,
        delta: float,
        confidence: float = 0.95,
        guesses: tuple[int, int] | None = None,
    ) -> float:
        """Bounds epsilon from below, if the training is a Gaussian mechanism.

        It assumes that the training has the trade-off curve of a Gaussian mechanism, and bounds
        its noise (Mahloujifar, Melis and Chaudhuri, "Auditing f-differential privacy in one
        run", ICML 2025). Steps on all data have such a curve, and steps on a sample nearly. The
        bound is about twice that of `epsilon_lower_bound`. For other trainings it is an
        estimate.

        Args:
            delta: As in `epsilon_lower_bound`, above 0 and below 1.
            confidence: As in `epsilon_lower_bound`.
            guesses: As in `epsilon_lower_bound`.

        Returns:
            The epsilon at `delta` of the Gaussian mechanism with the most noise that is not
            refuted. 0 refutes nothing.

        Raises:
            ArgumentError: As `epsilon_lower_bound`.
            MissingPackageError: SciPy is not installed.
        """
        check_number("delta", delta, 0, 1, open_ends=True)
        check_number("confidence", confidence, 0, 1, open_ends=True)
        tried = self._tried(guesses)
        confidence = 1 - (1 - confidence) / len(tried)
        mu = max(gaussian_lower_bound(**counts, confidence=confidence) for counts in tried)
        return gaussian_epsilon(mu, delta)

    def p_value(
        self,
        ledger: Ledger,
        relation: str = "add_or_remove_one",
        guesses: tuple[int, int] | None = None,
    ) -> float:
        """Returns the largest probability of so many right guesses if a ledger is right.

        It tests the ledger's whole trade-off curve, which follows from noise, sampling and
        steps, instead of one epsilon. Several numbers of guesses are tried together, as in
        `epsilon_lower_bound`.

        Args:
            ledger: The ledger of the training, `history.privacy.ledger`.
            relation: As in `tfdist.privacy.epsilon`.
            guesses: As in `epsilon_lower_bound`.

        Returns:
            Between 0 and 1. Below 0.05 the ledger is refuted with a confidence of 95 %.

        Raises:
            ArgumentError: As `epsilon_lower_bound`.
            MissingPackageError: SciPy or dp-accounting is not installed.
        """
        tried = self._tried(guesses)
        curve = curve_of_ledger(ledger, relation)
        return min(1.0, len(tried) * min(p_value_of(curve, **counts) for counts in tried))

    def _tried(self, guesses: tuple[int, int] | None) -> list[dict[str, int]]:
        """Counts the guesses and the right ones, for each number of guesses to try."""
        if not self.fair_coins:
            raise ArgumentError(
                "Each example must have been included by a fair coin of its own. Received: "
                "members and non-members that were chosen in another way. Use "
                "tfdist.privacy.canaries(...), or threshold_attack for an estimate."
            )
        tried = _numbers_of_guesses(len(self.scores)) if guesses is None else [guesses]
        return [
            {
                "num_canaries": len(self.scores),
                "guesses": highest + lowest,
                "right": self._right(highest, lowest),
            }
            for highest, lowest in tried
        ]

    def _right(self, highest: int, lowest: int) -> int:
        if min(highest, lowest) < 0 or highest + lowest > len(self.scores):
            raise ArgumentError(
                "`guesses` must be two numbers of at least 0, whose sum is at most the number "
                f"of canaries. Received: guesses={(highest, lowest)} and {len(self.scores)} "
                "canaries. Pass smaller numbers, or None."
            )
        # Equal scores are sorted with members first, so that guesses among them are wrong. This
        # can only lower the bound.
        ordered = self.included[np.lexsort((~self.included, self.scores))]
        as_members = ordered[len(ordered) - highest :]
        return int(as_members.sum()) + int((~ordered[:lowest]).sum())

    def threshold_attack(
        self, delta: float, confidence: float = 0.95, seed: int = 0
    ) -> ThresholdAttack:
        """Attacks with one threshold, and computes the epsilon that its success implies.

        In an (epsilon, delta)-private training, any outcome for a member is at most e^epsilon
        times as likely as for a non-member, plus delta (Kairouz, Oh and Viswanath, "The
        composition theorem for differential privacy", ICML 2015). The threshold is chosen on a
        random half of the scores. On the other half, Clopper and Pearson's intervals bound the
        two probabilities. They assume independent scores, but scores of one model are not
        quite independent. For a bound from a single training, use canaries.

        Args:
            delta: The delta of the guarantee, between 0 and 1.
            confidence: The confidence of both intervals together.
            seed: The seed of the random halves.

        Raises:
            ArgumentError: Fewer than 20 members or non-members.
            MissingPackageError: SciPy is not installed.
        """
        check_number("delta", delta, 0, 1)
        check_number("confidence", confidence, 0, 1, open_ends=True)
        if min(len(self.members), len(self.non_members)) < _FEWEST_SCORES:
            raise ArgumentError(
                f"A threshold needs at least {_FEWEST_SCORES} members and as many non-members. "
                f"Received: {len(self.members)} members and {len(self.non_members)} "
                "non-members. Audit with more examples."
            )
        rng = np.random.default_rng(seed)
        members, non_members = (rng.permutation(s) for s in (self.members, self.non_members))
        thresholds = np.unique(self.scores)
        best = max(
            (
                best_threshold(
                    members[::2], non_members[::2], thresholds, side, delta, confidence
                )
                for side in (True, False)
            ),
            key=lambda attack: attack.epsilon,
        )
        only = np.array([best.threshold])
        return best_threshold(
            members[1::2], non_members[1::2], only, best.says_member, delta, confidence
        )

    def plot(self) -> Any:
        """Draws the ROC curve, on logarithmic axes, and how the scores are distributed.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return plot_scores(self.members, self.non_members, self.roc(), self.auc)

    def __str__(self) -> str:
        text = (
            f"{len(self.members)} members and {len(self.non_members)} non-members: "
            f"AUC {self.auc:.3f}, advantage {self.advantage:.3f}"
        )
        return f"{text}, included by fair coins" if self.fair_coins else text


def _numbers_of_guesses(canaries: int) -> list[tuple[int, int]]:
    """Chooses the numbers of guesses to try, independently of the scores."""
    tried: list[tuple[int, int]] = []
    count = max(1, canaries // 2)
    while count >= _FEWEST_GUESSES or not tried:
        tried += [(count, count), (count, 0), (0, count)]
        count //= 2
    return tried if canaries > 1 else [(1, 0)]
