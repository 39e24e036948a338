"""What scores of members and non-members say: how well they are told apart, and epsilon."""

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
    """How well it can be told from a model who was trained on; `tfdist.privacy.audit`.

    `auc` and `advantage` describe one attack on one model. They are estimates, and that an
    attack fails shows no privacy: a better one may not. `epsilon_lower_bound` is a theorem,
    and can refute a claimed epsilon but never confirm it. `threshold_attack` is one between:
    a bound if each score came from a training of its own, and of one model an estimate.

    Args:
        scores: Shape [examples], float; the higher, the likelier a member.
        included: Shape [examples], bool: who was trained on.
        fair_coins: Whether each example was included by a fair coin of its own.

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
                f"shapes {scores.shape} and {included.shape}."
            )
        if np.isnan(scores).any():
            raise ArgumentError(
                f"`scores` must be numbers. Received: {int(np.isnan(scores).sum())} of "
                f"{len(scores)} are NaN. Did training diverge?"
            )
        if included.all() or not included.any():
            raise ArgumentError(
                "An audit needs members and non-members. Received: "
                f"{int(included.sum())} members of {len(included)} examples."
            )
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "included", included)

    @property
    def members(self) -> Floats:
        """Scores of those who were trained on."""
        return self.scores[self.included]

    @property
    def non_members(self) -> Floats:
        """Scores of those who were not."""
        return self.scores[~self.included]

    @property
    def auc(self) -> float:
        """The probability that a member scores above a non-member; 0.5 is chance.

        The area under the ROC curve, equal scores counted half.
        """
        others = np.sort(self.non_members)
        below = np.searchsorted(others, self.members, "left")
        up_to = np.searchsorted(others, self.members, "right")
        return float((below + up_to).mean() / (2 * len(others)))

    @property
    def advantage(self) -> float:
        """The largest difference of true and false positive rate, over all thresholds.

        0 is chance and 1 certainty (Yeom et al., "Privacy risk in machine learning", CSF
        2018). The threshold is chosen on the same scores, so it is above 0 even for scores
        that mean nothing: of n members and as many others, by about 0.9 / sqrt(n).
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
        """Returns the part of the members that is found at a false positive rate.

        What counts for those it happens to is the part that is found almost without error
        (Carlini et al., "Membership inference attacks from first principles", S&P 2022).

        Args:
            at: The false positive rate, 0.001 say; below 1 / non-members it means none.
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

        The highest scores are guessed to be members, the lowest to be non-members, and of
        those between nothing is said. How many are guessed must not depend on how well it
        goes. So either `guesses` is fixed before, or several numbers are tried, each at a
        confidence so much higher that all hold together (Bonferroni's correction).

        Args:
            delta: Of the guarantee, between 0 and 1.
            confidence: Probability with which the bound holds, over coins and training.
            guesses: How many of the highest and how many of the lowest scores, chosen before
                looking at them. If None, half of the canaries, a quarter and so on are tried,
                of both ends together and of each alone.

        Returns:
            A number from 0 on: the training cannot be (epsilon, delta)-private for less.

        Raises:
            ArgumentError: The examples were not included by fair coins, or more guesses than
                there are canaries.
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
        """Bounds epsilon from below as `epsilon_lower_bound`, for Gaussian mechanisms alone.

        It assumes that the training has the trade-off curve of some Gaussian mechanism, as
        steps on all data have, and steps on a sample nearly, and bounds which one
        (Mahloujifar, Melis and Chaudhuri, "Auditing f-differential privacy in one run", ICML
        2025). So it is about twice as large, and of other trainings an estimate.

        Args:
            delta: As in `epsilon_lower_bound`, above 0 and below 1.
            confidence: As in `epsilon_lower_bound`.
            guesses: As in `epsilon_lower_bound`.

        Returns:
            The epsilon at `delta` of the Gaussian mechanism with the least noise that is not
            excluded; 0 says nothing.

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
        """Returns how probable so many right guesses are, at most, if a ledger is right.

        The test is of the ledger's whole trade-off curve, that of its noise, sampling and
        steps, and not of one epsilon; with all numbers of guesses together as in
        `epsilon_lower_bound`.

        Args:
            ledger: What the training claims, `history.privacy.ledger`.
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
        """Counts guesses and right ones, for each number of guesses that is tried."""
        if not self.fair_coins:
            raise ArgumentError(
                "Each example must have been included by a fair coin of its own. Received: "
                "members and non-members that were chosen otherwise. Use "
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
                "`guesses` must be two numbers from 0 on, together at most the number of "
                f"canaries. Received: guesses={(highest, lowest)} of {len(self.scores)}."
            )
        # Equal scores come with members first: guessed wrong, which can only lower the bound.
        ordered = self.included[np.lexsort((~self.included, self.scores))]
        as_members = ordered[len(ordered) - highest :]
        return int(as_members.sum()) + int((~ordered[:lowest]).sum())

    def threshold_attack(
        self, delta: float, confidence: float = 0.95, seed: int = 0
    ) -> ThresholdAttack:
        """Attacks with one threshold, and says which epsilon its success implies.

        In an (epsilon, delta)-private training, whatever is said of a member is at most
        e^epsilon times as likely as of a non-member, plus delta (Kairouz, Oh and Viswanath,
        "The composition theorem for differential privacy", ICML 2015). The threshold is
        chosen on a random half of the scores; on the other half, Clopper and Pearson's
        intervals hold the two probabilities. They take the scores as independent, which those
        of one model are not quite: for a bound that holds of one run, use canaries.

        Args:
            delta: Of the guarantee, between 0 and 1.
            confidence: Of both intervals together.
            seed: Of the halves.

        Raises:
            ArgumentError: Fewer than 20 members or non-members.
            MissingPackageError: SciPy is not installed.
        """
        check_number("delta", delta, 0, 1)
        check_number("confidence", confidence, 0, 1, open_ends=True)
        if min(len(self.members), len(self.non_members)) < _FEWEST_SCORES:
            raise ArgumentError(
                f"A threshold needs at least {_FEWEST_SCORES} members and as many non-members. "
                f"Received: {len(self.members)} and {len(self.non_members)}."
            )
        rng = np.random.default_rng(seed)
        members, others = (rng.permutation(s) for s in (self.members, self.non_members))
        thresholds = np.unique(self.scores)
        chosen = max(
            (
                best_threshold(members[::2], others[::2], thresholds, side, delta, confidence)
                for side in (True, False)
            ),
            key=lambda attack: attack.epsilon,
        )
        only = np.array([chosen.threshold])
        return best_threshold(
            members[1::2], others[1::2], only, chosen.says_member, delta, confidence
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
    """Chooses what to try, without a look at the scores."""
    tried: list[tuple[int, int]] = []
    count = max(1, canaries // 2)
    while count >= _FEWEST_GUESSES or not tried:
        tried += [(count, count), (count, 0), (0, count)]
        count //= 2
    return tried if canaries > 1 else [(1, 0)]
