"""Measures an example's contribution to the sum of clipped gradients, and to other examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfdist.privacy.checking.adversarial import cancelled, families, mutated
from tfdist.privacy.checking.columns import Columns, joined, rows_of, selected
from tfdist.privacy.checking.recorder import Floats, Planned, Subject
from tfdist.privacy.checking.report import Finding
from tfdist.privacy.schedules import norm_of, without_schedules
from tfdist.privacy.settings import DPSGD

Plan = Sequence[Sequence[int]]
_TOLERANCE = 1e-3  # of norms and sums in float32
_COARSE = 2e-2  # the same in half precision
_BATCHES = 12
_KEPT = 8


@dataclass(frozen=True)
class Noiseless:
    """Sums of clipped gradients without noise, of planned batches.

    Args:
        subject: The model.
        privacy: The user's settings.
    """

    subject: Subject
    privacy: DPSGD

    def settings(self, units: Any) -> DPSGD:
        """Returns settings with the user's clipping, without noise, and with a seed.

        Args:
            units: The user of each row, or None.
        """
        settings = without_schedules(self.privacy)
        return DPSGD(
            settings.l2_norm_clip,
            noise_multiplier=0.0,
            delta=settings.delta,
            microbatch_size=settings.microbatch_size,
            clipping=settings.clipping,
            target_quantile=settings.target_quantile,
            clip_learning_rate=0.0,
            group_ids=units,
            max_rows_per_group=settings.max_rows_per_group,
            seed=1,
        )

    def sums(
        self,
        columns: Columns,
        plan: Plan,
        consume: Callable[[int, Floats], None],
        units: Any = None,
    ) -> Floats:
        """Computes the sums of batches, without the gradients of regularizers.

        Args:
            columns: The data.
            plan: The rows, or the users, of each batch.
            consume: Called with the number of a batch and its sum.
            units: The user of each row, or None if examples are clipped.

        Returns:
            The gradients of regularizers.
        """
        penalty: list[Floats] = []

        def record(step: int, gradient: Floats) -> None:
            if step == 0:  # an empty batch
                penalty.append(gradient)
            else:
                consume(step - 1, gradient - penalty[0])

        batches = tuple(tuple(int(n) for n in batch) for batch in ((), *plan))
        if self.privacy.group_ids is not None and units is None:
            units = np.arange(rows_of(columns))
        self.subject.rewind()
        self.subject.fit(
            columns,
            record,
            batch_size=1,  # so that sums are divided by 1
            epochs=1,
            steps_per_epoch=len(batches),
            sampler=Planned(plan=batches),
            privacy=self.settings(units),
            seed=1,
        )
        return penalty[0]


def largest_contribution(
    noiseless: Noiseless, user_examples: Columns, rounds: int, rng: np.random.Generator
) -> list[Finding]:
    """Searches for the example with the largest contribution.

    Args:
        noiseless: Computes sums without noise.
        user_examples: Some of the user's examples.
        rounds: How often the largest examples are changed and measured again.
        rng: The random generator of the search.
    """
    model = noiseless.subject.model
    few_examples = selected(user_examples, np.arange(min(4, rows_of(user_examples))))
    some_examples = selected(user_examples, np.arange(min(12, rows_of(user_examples))))
    parts = [user_examples, families(model, some_examples, rng)]
    by_descent = cancelled(model, few_examples)
    if by_descent is not None:
        parts.append(by_descent)
    examples = joined(parts)
    norms = _norms(noiseless, user_examples, examples)
    clip, of_own = norm_of(noiseless.privacy), norms[: rows_of(user_examples)]
    count = len(norms)
    best, best_norms = examples, norms
    for _ in range(rounds):
        order = np.argsort(-best_norms, kind="stable")[:_KEPT]
        parents = selected(best, np.repeat(order, 4))
        best = joined([selected(best, order), mutated(model, parents, rng)])
        best_norms = _norms(noiseless, user_examples, best)
        count += len(best_norms) - _KEPT
        norms = np.concatenate([norms, best_norms])
    facts = [
        Finding(
            "contribution: largest found over l2_norm_clip",
            float(norms.max() / clip),
            1.0,
            -np.inf,
            1 + _TOLERANCE,
            f"{count} examples tried; of {len(of_own)} of yours the largest "
            f"{float(of_own.max() / clip):.4g}, clipped "
            f"{float((of_own > clip * (1 - _TOLERANCE)).mean()):.0%}",
        )
    ]
    if noiseless.privacy.group_ids is not None:
        order = np.argsort(-norms[: rows_of(examples)], kind="stable")[:_KEPT]
        facts.append(_of_users(noiseless, user_examples, selected(examples, order), rng))
    return facts


def _norms(noiseless: Noiseless, user_examples: Columns, tried: Columns) -> Any:
    """Measures the contribution of each of some examples.

    Some of the user's examples come first, since `fit` checks the model on the first rows.
    """
    first = selected(user_examples, np.arange(min(3, rows_of(user_examples))))
    ahead, count = rows_of(first), rows_of(tried)
    norms = np.zeros(count)

    def record(step: int, contribution: Floats) -> None:
        norms[step] = np.linalg.norm(contribution.astype(np.float64))

    noiseless.sums(joined([first, tried]), [[ahead + n] for n in range(count)], record)
    return norms


def _of_users(
    noiseless: Noiseless, user_examples: Columns, largest: Columns, rng: np.random.Generator
) -> Finding:
    """Measures users with several examples, equal or different ones."""
    cap = noiseless.privacy.max_rows_per_group or 16
    rows, users = [np.arange(rows_of(user_examples))], [np.arange(rows_of(user_examples))]
    data, user = [user_examples], rows_of(user_examples)
    for n in range(2 * rows_of(largest)):
        picked = np.full(2 * cap, n // 2) if n % 2 else rng.integers(0, rows_of(largest), cap)
        data.append(selected(largest, picked))
        rows.append(picked)
        users.append(np.full(len(picked), user))
        user += 1
    norms: list[float] = []
    noiseless.sums(
        joined(data),
        [[u] for u in range(rows_of(user_examples), user)],
        lambda _, c: norms.append(float(np.linalg.norm(c.astype(np.float64)))),
        np.concatenate(users),
    )
    return Finding(
        "contribution: largest of a user with several examples, over l2_norm_clip",
        max(norms) / norm_of(noiseless.privacy),
        1.0,
        -np.inf,
        1 + _TOLERANCE,
        f"{len(norms)} users of up to {2 * cap} examples tried",
    )


@dataclass(frozen=True)
class Neighbours:
    """The comparison of neighbouring data sets.

    Attributes:
        facts: The findings.
        notes: Properties that were not measured.
        draws_nothing: Whether a batch has the same sum in every step.
    """

    facts: tuple[Finding, ...]
    notes: tuple[str, ...]
    draws_nothing: bool


def compare_neighbours(
    noiseless: Noiseless, user_examples: Columns, is_half: bool
) -> Neighbours:
    """Removes one example from batches, and checks that nothing else changes.

    A layer that mixes examples changes the contributions of other examples. So do random
    numbers that depend on the place in the batch, since a missing example moves the examples
    after it.

    Args:
        noiseless: Computes sums without noise.
        user_examples: Two examples that are removed in turn, a huge one and one that is not a
            number, followed by some of the user's examples.
        is_half: Whether the model computes in half precision.
    """
    count = rows_of(user_examples)
    rng = np.random.default_rng(2)
    batches, without = [], []
    for number in range(_BATCHES):
        other_examples = rng.permutation(np.arange(2, count))
        place = (0, len(other_examples) // 2, len(other_examples))[number % 3]
        batches.append(list(np.insert(other_examples, place, number % 2)))
        without.append(list(other_examples))
    alone = [[n] for n in batches[0]]
    first = _vectors(noiseless, user_examples, [*batches, batches[0], *alone])
    repeated = _vectors(noiseless, user_examples, batches[:2])
    second = _vectors(noiseless, user_examples, without)
    clip = norm_of(noiseless.privacy)
    sizes = [float(np.linalg.norm(np.nan_to_num(v))) for v in first[:_BATCHES]]
    size = max(1e-30, *sizes)
    tolerance = _COARSE if is_half else _TOLERANCE
    limit = tolerance * size
    is_repeatable = all(_is_near(a, b, limit) for a, b in zip(first, repeated, strict=False))
    draws_nothing = _is_near(first[0], first[_BATCHES], limit)
    facts, notes = [], []
    if is_repeatable:
        changes = [_distance(a, b) for a, b in zip(first, second, strict=False)]
        facts.append(
            Finding(
                "neighbours: largest change without one example, over l2_norm_clip",
                float(np.max(changes)) / clip,
                1.0,
                -np.inf,
                1 + tolerance + 1e-6 * size / clip,
                f"{_BATCHES} batches of {count - 1}, without one that is huge or no number",
            )
        )
    else:
        notes.append(
            "what changes without one example: two runs with the same seed differ, so random "
            "numbers of the model hide it"
        )
    if draws_nothing:
        parts = first[_BATCHES + 1 :]
        lengths = sum(float(np.linalg.norm(part)) for part in parts)
        facts.append(
            Finding(
                "neighbours: sum of a batch less the sum of its examples alone",
                _distance(first[0], np.sum(parts, 0)) / max(lengths, 1e-30),
                0.0,
                -np.inf,
                tolerance,
                "relative; a layer that mixes examples shows here",
            )
        )
    return Neighbours(tuple(facts), tuple(notes), draws_nothing)


def _vectors(noiseless: Noiseless, columns: Columns, plan: Plan) -> list[Any]:
    sums: list[Any] = []
    noiseless.sums(columns, plan, lambda _, v: sums.append(v.astype(np.float64)))
    return sums


def _is_near(a: Any, b: Any, limit: float) -> bool:
    """Compares sums. Numbers that are not finite in both sums count as equal."""
    alike = bool((np.isfinite(a) == np.isfinite(b)).all())
    return alike and _distance(np.nan_to_num(a), np.nan_to_num(b)) < limit


def _distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b))
