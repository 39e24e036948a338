"""The noise of a `fit`: what its gradients have beside the sums of clipped ones."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.privacy.accounting.ledger import Ledger
from tfdist.privacy.checking.columns import Columns, mapped, rows_of, taken
from tfdist.privacy.checking.contributions import Noiseless
from tfdist.privacy.checking.noise_tests import Block, deviation, noise_facts
from tfdist.privacy.checking.recorder import Floats, Planned
from tfdist.privacy.checking.report import Finding
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.schedules import norm_of, schedule_of
from tfdist.privacy.settings import DPSGD

_FEWEST, _MOST = 32, 400  # steps
_BATCHES, _ROWS = 4, 16
_CYCLE = 4 * 2 * _BATCHES  # so that each part of the steps begins with the same batch


@dataclass(frozen=True)
class Sampled:
    """Which weights are looked at.

    Attributes:
        columns: Their numbers among all.
        blocks: Which of them are of which variable.
    """

    columns: NDArray[np.int64]
    blocks: tuple[Block, ...]


def sampled(variables: Sequence[Any], most: int, rng: np.random.Generator) -> Sampled:
    """Chooses weights, some of each variable.

    Args:
        variables: All that are trained.
        most: About how many.
        rng: Chooses.
    """
    sizes = [math.prod(v.shape) for v in variables]
    part = min(1.0, most / max(1, sum(sizes)))
    columns, blocks, begin, chosen = [], [], 0, 0
    for variable, size in zip(variables, sizes, strict=True):
        count = min(size, max(64, math.ceil(size * part)))
        columns.append(begin + np.sort(rng.choice(size, count, replace=False)))
        blocks.append(Block(variable.path, slice(chosen, chosen + count)))
        begin, chosen = begin + size, chosen + count
    return Sampled(
        np.concatenate(columns), tuple(b for b in blocks if b.columns.stop > b.columns.start)
    )


@dataclass(frozen=True)
class NoiseCheck:
    """Measures noise.

    Args:
        noiseless: Knows the sums without noise.
        columns: The user's data.
        batch_size: As in `fit`.
        own: Numbers of some of the rows.
        is_repeatable: Whether a batch gives the same sum in every step.
        numbers: About how many to draw.
    """

    noiseless: Noiseless
    columns: Columns
    batch_size: int
    own: NDArray[np.int64]
    is_repeatable: bool
    numbers: int

    def facts(self, alpha: float, rng: np.random.Generator) -> list[Finding]:
        """Measures it.

        Args:
            alpha: Probability of a false alarm of each test.
            rng: Chooses weights and batches.
        """
        subject = self.noiseless.subject
        if not subject.weights:  # which `fit` builds
            self.noiseless.sums(taken(self.columns, self.own), [], lambda _, __: None)
        weights = sampled(subject.weights, self.numbers // _FEWEST, rng)
        steps = min(_MOST, max(_FEWEST, self.numbers // len(weights.columns)))
        steps = -(-steps // _CYCLE) * _CYCLE
        if isinstance(self.noiseless.privacy, DPFTRL):
            noise = self._correlated(steps, weights)
        else:
            noise = self._independent(steps, weights, rng)
        facts = noise_facts(noise, weights.blocks, alpha)
        if self._asked.target_quantile is not None:
            facts.append(self._of_count(alpha))
        return facts

    @property
    def _asked(self) -> DPSGD:
        return dataclasses.replace(
            self.noiseless.privacy,
            seed=None,
            spent=Ledger(),
            augmentations=1,
            clip_learning_rate=0.0,
        )

    def _deviations(self, first: int, planned: int) -> list[float]:
        """What the noise on the sums of a `fit`'s steps must have.

        Args:
            first: The first step that is looked at.
            planned: Steps of the whole training.
        """
        schedule = schedule_of(self._asked, planned)
        if schedule is None:
            return [self._deviation()] * (planned - first)
        runs = np.searchsorted(schedule.begins, np.arange(first, planned), "right") - 1
        deviations = np.array(schedule.multipliers) * np.array(schedule.norms)
        return list(map(float, deviations[runs]))

    def _deviation(self) -> float:
        """What the noise on the sum must have (Andrew et al., 2021, theorem 1, if adaptive)."""
        asked = self._asked
        assert asked.noise_multiplier is not None
        multiplier = asked.noise_multiplier
        assert not callable(multiplier)
        if asked.target_quantile is not None:
            multiplier = (multiplier**-2 - (2 * self._count_deviation()) ** -2) ** -0.5
        return float(multiplier * norm_of(asked))

    def _units(self) -> float:
        """How many examples, or users, a step has on average."""
        asked = self._asked
        if asked.group_ids is None:
            return float(self.batch_size)
        users, counts = np.unique(np.asarray(asked.group_ids), return_counts=True)
        kept = np.minimum(counts, asked.max_rows_per_group or counts.max()).sum()
        return self.batch_size * len(users) / float(kept)

    def _count_deviation(self) -> float:
        """What the noise on the count of those within the norm must have."""
        return float(self._asked.count_noise or self._units() / 20)

    def _of_count(self, alpha: float) -> Finding:
        """Reads the noise on the count of those within the norm from how the norm moves.

        In steps with one example, or user, without weight, so within it: the norm's logarithm
        moves by the rate times the part within, less the quantile (Andrew et al., 2021).
        """
        asked, rate = self._asked, 0.2
        quantile, units = asked.target_quantile, self._units()
        assert quantile is not None
        x, y, weight = self.columns
        none = np.zeros(rows_of(self.columns), np.float32)
        logs = self.noiseless.subject.fit(
            (x, y, none if weight is None else mapped(np.zeros_like, weight)),
            lambda _, __: None,
            batch_size=self.batch_size,
            epochs=1,
            steps_per_epoch=_MOST + 1,
            sampler=Planned(plan=((0,),) * (_MOST + 1)),
            privacy=dataclasses.replace(asked, clip_learning_rate=rate),
        )
        norms = np.array([entry["l2_norm_clip"] for entry in logs])
        count = (-np.diff(np.log(norms)) / rate - (0.5 - quantile)) * units - 0.5
        fact = deviation(count[:, None] / self._count_deviation(), alpha)
        return dataclasses.replace(fact, name=f"{fact.name}, of the count within the norm")

    def _independent(self, steps: int, weights: Sampled, rng: np.random.Generator) -> Any:
        batches: list[tuple[int, ...]] = []
        private = self.noiseless.privacy
        moves = callable(private.l2_norm_clip)  # then sums are others in each step
        if self.is_repeatable and private.group_ids is None and not moves:
            batches = [
                tuple(np.sort(rng.choice(len(self.own), min(_ROWS, len(self.own)), False)))
                for _ in range(_BATCHES)
            ]
        subject, some = self.noiseless.subject, taken(self.columns, self.own)
        sums: list[Floats] = []
        penalty: Any = 0.0
        if batches or any(v.regularizer is not None for v in subject.weights):
            all_weights = self.noiseless.sums(
                some, batches, lambda _, v: sums.append(v[weights.columns])
            )
            penalty = all_weights[weights.columns]
        # Every other batch is empty, so that noise is seen alone.
        kinds = [n for batch in range(len(batches)) for n in (None, batch)] or [None]
        numbered: dict[int | None, tuple[int, ...]] = {
            n: tuple(self.own[list(batch)].tolist()) for n, batch in enumerate(batches)
        }
        plan = tuple(numbered.get(kinds[step % len(kinds)], ()) for step in range(steps))
        found: list[Any] = []

        def reading(first: int, planned: int) -> Any:
            # Not by the step's number: one that resumes may begin at 0 or go on.
            coming = enumerate(self._deviations(first, planned))

            def read(_: int, gradient: Floats) -> None:
                step, deviation = next(coming)
                kind = kinds[step % len(kinds)]
                expected: Any = 0.0
                if kind is not None:
                    expected = sums[kind].astype(np.float64) / self.batch_size
                noisy = gradient[weights.columns].astype(np.float64) - penalty
                found.append((noisy - expected) * (self.batch_size / deviation))

            return read

        quarter = steps // 4
        options = {
            "batch_size": self.batch_size,
            "steps_per_epoch": quarter,
            "sampler": Planned(plan=plan),
            "privacy": self._asked,
        }
        subject.rewind()
        subject.fit(self.columns, reading(0, 2 * quarter), epochs=2, **options)
        subject.fit(self.columns, reading(0, quarter), epochs=1, **options)
        with tempfile.TemporaryDirectory() as folder:
            resumed = {**options, "checkpoint": folder}
            subject.fit(self.columns, lambda _, __: None, epochs=1, **resumed)
            read = reading(quarter, 2 * quarter)
            subject.fit(self.columns, read, epochs=2, **resumed)
        return np.array(found)

    def _correlated(self, steps: int, weights: Sampled) -> Any:
        """Returns what each step drew, from the noise that later steps take back in part."""
        private = self._asked
        assert isinstance(private, DPFTRL)
        rows = min(rows_of(self.columns), 8 * self.batch_size)
        epochs = -(-steps // (2 * -(-rows // self.batch_size)))
        some = taken(self.columns, np.arange(rows))
        if not self.is_repeatable:  # no weight, no gradient
            x, y, weight = some
            none = (
                np.zeros(rows, np.float32) if weight is None else mapped(np.zeros_like, weight)
            )
            some = x, y, none
        options = {"batch_size": self.batch_size, "epochs": epochs, "shuffle": False, "seed": 1}
        private = dataclasses.replace(private, min_separation=None)

        def recorded(multiplier: float) -> Any:
            asked = dataclasses.replace(
                private, noise_multiplier=multiplier, target_epsilon=None
            )
            found: list[Floats] = []
            self.noiseless.subject.rewind()
            self.noiseless.subject.fit(
                some, lambda _, g: found.append(g[weights.columns]), privacy=asked, **options
            )
            return np.array(found, np.float64)

        assert private.noise_multiplier is not None
        assert not callable(private.noise_multiplier)
        sums = recorded(0.0)
        scale = self.batch_size / self._deviation()
        drawn = [
            _uncorrelated((recorded(private.noise_multiplier) - sums) * scale, private.bands)
            for _ in range(2)
        ]
        return np.concatenate(drawn)


def _uncorrelated(noise: Any, bands: int) -> Any:
    """Undoes the correlation: noise of a step is (1 - x)^(1/2) of what was drawn, cut off.

    Kalinin et al., "Back to square roots", ICLR 2026: the first `bands` coefficients of that
    series, here as binomial coefficients.
    """
    from scipy import special

    factors = special.binom(0.5, np.arange(bands)) * (-1.0) ** np.arange(bands)
    drawn = np.zeros_like(noise)
    for step in range(len(noise)):
        back = range(1, min(bands, step + 1))
        drawn[step] = noise[step] - sum(factors[lag] * drawn[step - lag] for lag in back)
    return drawn
