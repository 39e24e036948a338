"""Measures the noise of a `fit`: its gradients minus the sums of clipped gradients."""

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
from tfdist.privacy.checking.columns import Columns, mapped, rows_of, selected
from tfdist.privacy.checking.contributions import Noiseless
from tfdist.privacy.checking.noise_tests import Block, deviation, noise_facts
from tfdist.privacy.checking.recorder import Floats, Planned
from tfdist.privacy.checking.report import Finding
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.schedules import norm_of, schedule_of
from tfdist.privacy.settings import DPSGD

_FEWEST, _MOST = 32, 400  # steps
_BATCHES, _ROWS = 4, 16
_CYCLE = 4 * 2 * _BATCHES  # each of four parts of the steps begins with the same batch


@dataclass(frozen=True)
class Sampled:
    """A sample of the weights.

    Attributes:
        columns: The numbers of the weights.
        blocks: The weights of each variable.
    """

    columns: NDArray[np.int64]
    blocks: tuple[Block, ...]


def sampled(variables: Sequence[Any], most: int, rng: np.random.Generator) -> Sampled:
    """Chooses weights, some of each variable.

    Args:
        variables: All trained variables.
        most: About how many weights to choose.
        rng: The random generator of the choice.
    """
    sizes = [math.prod(v.shape) for v in variables]
    part = min(1.0, most / max(1, sum(sizes)))
    columns, blocks, begin, sample_size = [], [], 0, 0
    for variable, size in zip(variables, sizes, strict=True):
        count = min(size, max(64, math.ceil(size * part)))
        columns.append(begin + np.sort(rng.choice(size, count, replace=False)))
        blocks.append(Block(variable.path, slice(sample_size, sample_size + count)))
        begin, sample_size = begin + size, sample_size + count
    return Sampled(
        np.concatenate(columns), tuple(b for b in blocks if b.columns.stop > b.columns.start)
    )


@dataclass(frozen=True)
class NoiseCheck:
    """Measures noise.

    Args:
        noiseless: Computes sums without noise.
        columns: The user's data.
        batch_size: As in `fit`.
        row_numbers: The numbers of some rows.
        is_repeatable: Whether a batch has the same sum in every step.
        numbers: About how many random numbers to measure.
    """

    noiseless: Noiseless
    columns: Columns
    batch_size: int
    row_numbers: NDArray[np.int64]
    is_repeatable: bool
    numbers: int

    def facts(self, alpha: float, rng: np.random.Generator) -> list[Finding]:
        """Measures the noise.

        Args:
            alpha: The probability of a false alarm of each test.
            rng: The random generator for the choice of weights and batches.
        """
        subject = self.noiseless.subject
        if not subject.weights:  # which `fit` builds
            self.noiseless.sums(
                selected(self.columns, self.row_numbers), [], lambda _, __: None
            )
        weights = sampled(subject.weights, self.numbers // _FEWEST, rng)
        steps = min(_MOST, max(_FEWEST, self.numbers // len(weights.columns)))
        steps = -(-steps // _CYCLE) * _CYCLE
        if isinstance(self.noiseless.privacy, DPFTRL):
            noise = self._correlated(steps, weights)
        else:
            noise = self._independent(steps, weights, rng)
        facts = noise_facts(noise, weights.blocks, alpha)
        if self._settings.target_quantile is not None:
            facts.append(self._of_count(alpha))
        return facts

    @property
    def _settings(self) -> DPSGD:
        return dataclasses.replace(
            self.noiseless.privacy,
            seed=None,
            spent=Ledger(),
            augmentations=1,
            clip_learning_rate=0.0,
        )

    def _deviations(self, first: int, planned_steps: int) -> list[float]:
        """Returns the expected standard deviations of the noise on the steps of a `fit`.

        Args:
            first: The first measured step.
            planned_steps: The planned steps of the training.
        """
        schedule = schedule_of(self._settings, planned_steps)
        if schedule is None:
            return [self._deviation()] * (planned_steps - first)
        runs = np.searchsorted(schedule.begins, np.arange(first, planned_steps), "right") - 1
        deviations = np.array(schedule.multipliers) * np.array(schedule.norms)
        return list(map(float, deviations[runs]))

    def _deviation(self) -> float:
        """Returns the expected standard deviation of the noise on the sum.

        With adaptive clipping it is that of Andrew et al., 2021, theorem 1.
        """
        settings = self._settings
        assert settings.noise_multiplier is not None
        multiplier = settings.noise_multiplier
        assert not callable(multiplier)
        if settings.target_quantile is not None:
            multiplier = (multiplier**-2 - (2 * self._count_deviation()) ** -2) ** -0.5
        return float(multiplier * norm_of(settings))

    def _units(self) -> float:
        """Returns the mean number of examples, or of users, of a step."""
        settings = self._settings
        if settings.group_ids is None:
            return float(self.batch_size)
        users, counts = np.unique(np.asarray(settings.group_ids), return_counts=True)
        rows = np.minimum(counts, settings.max_rows_per_group or counts.max()).sum()
        return self.batch_size * len(users) / float(rows)

    def _count_deviation(self) -> float:
        """Returns the expected standard deviation of the noise on the adaptive count."""
        return float(self._settings.count_noise or self._units() / 20)

    def _of_count(self, alpha: float) -> Finding:
        """Measures the noise on the count of units within the norm, by how the norm moves.

        Each step has one unit with a sample weight of 0, which is within the norm. The norm's
        logarithm moves by the rate times the fraction within the norm minus the quantile
        (Andrew et al., 2021).
        """
        settings, rate = self._settings, 0.2
        quantile, units = settings.target_quantile, self._units()
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
            privacy=dataclasses.replace(settings, clip_learning_rate=rate),
        )
        norms = np.array([entry["l2_norm_clip"] for entry in logs])
        count = (-np.diff(np.log(norms)) / rate - (0.5 - quantile)) * units - 0.5
        fact = deviation(count[:, None] / self._count_deviation(), alpha)
        return dataclasses.replace(fact, name=f"{fact.name}, of the count within the norm")

    def _independent(self, steps: int, weights: Sampled, rng: np.random.Generator) -> Any:
        batches: list[tuple[int, ...]] = []
        private = self.noiseless.privacy
        moves = callable(private.l2_norm_clip)  # then sums differ between steps
        if self.is_repeatable and private.group_ids is None and not moves:
            count = len(self.row_numbers)
            batches = [
                tuple(np.sort(rng.choice(count, min(_ROWS, count), False)))
                for _ in range(_BATCHES)
            ]
        subject, examples = self.noiseless.subject, selected(self.columns, self.row_numbers)
        sums: list[Floats] = []
        penalty: Any = 0.0
        if batches or any(v.regularizer is not None for v in subject.weights):
            all_weights = self.noiseless.sums(
                examples, batches, lambda _, v: sums.append(v[weights.columns])
            )
            penalty = all_weights[weights.columns]
        # Every other batch is empty, so that it has noise alone.
        kinds = [n for batch in range(len(batches)) for n in (None, batch)] or [None]
        numbered: dict[int | None, tuple[int, ...]] = {
            n: tuple(self.row_numbers[list(batch)].tolist()) for n, batch in enumerate(batches)
        }
        plan = tuple(numbered.get(kinds[step % len(kinds)], ()) for step in range(steps))
        noise: list[Any] = []

        def reading(first: int, planned_steps: int) -> Any:
            # Steps are counted here: in a resumed training their numbers may begin at 0 or
            # continue.
            coming = enumerate(self._deviations(first, planned_steps))

            def read(_: int, gradient: Floats) -> None:
                step, deviation = next(coming)
                kind = kinds[step % len(kinds)]
                expected: Any = 0.0
                if kind is not None:
                    expected = sums[kind].astype(np.float64) / self.batch_size
                noisy = gradient[weights.columns].astype(np.float64) - penalty
                noise.append((noisy - expected) * (self.batch_size / deviation))

            return read

        quarter = steps // 4
        options = {
            "batch_size": self.batch_size,
            "steps_per_epoch": quarter,
            "sampler": Planned(plan=plan),
            "privacy": self._settings,
        }
        subject.rewind()
        subject.fit(self.columns, reading(0, 2 * quarter), epochs=2, **options)
        subject.fit(self.columns, reading(0, quarter), epochs=1, **options)
        with tempfile.TemporaryDirectory() as folder:
            resumed = {**options, "checkpoint": folder}
            subject.fit(self.columns, lambda _, __: None, epochs=1, **resumed)
            read = reading(quarter, 2 * quarter)
            subject.fit(self.columns, read, epochs=2, **resumed)
        return np.array(noise)

    def _correlated(self, steps: int, weights: Sampled) -> Any:
        """Returns the random numbers of each step, recovered from correlated noise."""
        private = self._settings
        assert isinstance(private, DPFTRL)
        rows = min(rows_of(self.columns), 8 * self.batch_size)
        epochs = -(-steps // (2 * -(-rows // self.batch_size)))
        examples = selected(self.columns, np.arange(rows))
        if not self.is_repeatable:  # with a sample weight of 0, gradients are 0
            x, y, weight = examples
            none = (
                np.zeros(rows, np.float32) if weight is None else mapped(np.zeros_like, weight)
            )
            examples = x, y, none
        options = {"batch_size": self.batch_size, "epochs": epochs, "shuffle": False, "seed": 1}
        private = dataclasses.replace(private, min_separation=None)

        def recorded(multiplier: float) -> Any:
            settings = dataclasses.replace(
                private, noise_multiplier=multiplier, target_epsilon=None
            )
            gradients: list[Floats] = []
            self.noiseless.subject.rewind()
            self.noiseless.subject.fit(
                examples,
                lambda _, g: gradients.append(g[weights.columns]),
                privacy=settings,
                **options,
            )
            return np.array(gradients, np.float64)

        assert private.noise_multiplier is not None
        assert not callable(private.noise_multiplier)
        sums = recorded(0.0)
        scale = self.batch_size / self._deviation()
        runs = [
            _uncorrelated((recorded(private.noise_multiplier) - sums) * scale, private.bands)
            for _ in range(2)
        ]
        return np.concatenate(runs)


def _uncorrelated(noise: Any, bands: int) -> Any:
    """Inverts the correlation of noise.

    The factors of correlated noise are the first `bands` coefficients of (1 - x)^(1/2) (Kalinin
    et al., "Back to square roots", ICLR 2026). Here they are computed as binomial coefficients,
    independently of the tested code.
    """
    from scipy import special

    factors = special.binom(0.5, np.arange(bands)) * (-1.0) ** np.arange(bands)
    normal = np.zeros_like(noise)
    for step in range(len(noise)):
        back = range(1, min(bands, step + 1))
        normal[step] = noise[step] - sum(factors[lag] * normal[step - lag] for lag in back)
    return normal
