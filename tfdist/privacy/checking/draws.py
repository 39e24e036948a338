"""Measures sampling by a model with one weight for each example."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from tfdist.privacy.accounting.ledger import Ledger
from tfdist.privacy.checking.draw_tests import draw_facts
from tfdist.privacy.checking.recorder import Floats, subject_of
from tfdist.privacy.checking.report import Finding
from tfdist.privacy.dpftrl import DPFTRL
from tfdist.privacy.sampling.rates import PoissonLike
from tfdist.privacy.schedules import norm_of
from tfdist.privacy.settings import DPSGD

_TOLERANCE = 1e-3
_MOST_DRAWS = 20_000_000
_PARTS = 3  # two epochs of a `fit`, and a `fit` more


@dataclass(frozen=True)
class Draws:
    """The sampling of a `fit`.

    Attributes:
        privacy: The user's settings.
        num_rows: The number of examples.
        batch_size: As in `fit`.
        targets: The targets of the examples, for samplers that depend on them.
        sampler: As in `fit`.
        strategy: As in `fit`.
    """

    privacy: DPSGD
    num_rows: int
    batch_size: int
    targets: Any
    sampler: Any
    strategy: Any

    @property
    def users(self) -> NDArray[np.int64]:
        """The number of each example's user, shape [examples], or its own without users."""
        ids = self.privacy.group_ids
        if ids is None:
            return np.arange(self.num_rows)
        return np.unique(np.asarray(ids), return_inverse=True)[1].reshape(-1)

    @property
    def probability(self) -> Any:
        """The expected probability with which a step draws an example or a user."""
        if isinstance(self.sampler, PoissonLike):
            repeats = self.sampler.repeats(self.num_rows)
            assert repeats is not None
            return np.minimum(1.0, self.batch_size * repeats / repeats.sum())
        if self.privacy.group_ids is None:
            return min(1.0, self.batch_size / self.num_rows)
        counts = np.bincount(self.users)
        limit = self.privacy.max_rows_per_group or counts.max()
        return min(1.0, self.batch_size / int(np.minimum(counts, limit).sum()))

    @property
    def divisor(self) -> float:
        """The expected divisor of sums, whatever their batch has."""
        if isinstance(self.sampler, PoissonLike):
            return float(self.probability.sum())
        return float(self.batch_size)


def measure_draws(draws: Draws, steps: int, alpha: float) -> list[Finding]:
    """Trains a model with a weight for each example, and reads which examples took part.

    Each example changes its own weight by `l2_norm_clip` over the expected batch, and nothing
    else changes this weight. So the weights show the effect of sampling, the split over
    replicas, clipping, the sum over replicas and the division.

    Args:
        draws: The sampling.
        steps: About how many steps to measure, fewer with many examples.
        alpha: The probability of a false alarm of each test.
    """
    if isinstance(draws.privacy, DPFTRL):
        return _in_turn(draws, draws.privacy)
    steps_per_epoch = max(20, min(steps, _MOST_DRAWS // draws.num_rows) // _PARTS)
    clip = norm_of(draws.privacy)
    private = dataclasses.replace(_noiseless(draws.privacy), group_ids=draws.privacy.group_ids)
    with subject_of(_model(draws.num_rows), draws.strategy) as subject:
        options = {
            "privacy": private,
            "sampler": draws.sampler,
            "steps_per_epoch": steps_per_epoch,
        }
        parts = _moved(subject, draws, epochs=2, **options)
        parts += _moved(subject, draws, epochs=1, **options)
    users = draws.users
    squares = np.array(
        [np.bincount(users, weights=(row.astype(np.float64) / clip) ** 2) for row in parts]
    )
    times = np.sqrt(squares) * draws.divisor
    counts = np.round(times)
    facts = [
        Finding(
            "division: an example's part, over l2_norm_clip over the expected batch",
            float(times[counts > 0].mean()) if (counts > 0).any() else 0.0,
            1.0,
            1 - _TOLERANCE,
            1 + _TOLERANCE,
            f"{int((counts > 0).sum())} parts, of batches of any size",
        ),
        Finding(
            "draws: largest part of an example in a step, in units of the right one",
            float(times.max(initial=0.0)),
            1.0,
            -np.inf,
            1 + _TOLERANCE,
        ),
    ]
    return [*facts, *draw_facts(counts > 0, draws.probability, alpha)]


def _in_turn(draws: Draws, privacy: DPFTRL) -> list[Finding]:
    """Checks that each example takes part once an epoch, in the same step of the epoch."""
    rows = min(draws.num_rows, 200 * draws.batch_size, _MOST_DRAWS // 400)
    draws = dataclasses.replace(draws, num_rows=rows)
    private = _noiseless(dataclasses.replace(privacy, bands=1, min_separation=None))
    with subject_of(_model(rows), draws.strategy) as subject:
        parts = np.array(_moved(subject, draws, epochs=2, privacy=private))
    scale = draws.batch_size / norm_of(draws.privacy)
    first, second = np.split(np.abs(parts) * scale, 2)
    return [
        Finding(
            "turns: an example's part of an epoch, in units of the right one, the largest",
            float(max(first.sum(0).max(), second.sum(0).max())),
            1.0,
            -np.inf,
            1 + _TOLERANCE,
            f"{rows} examples in {len(first)} steps an epoch",
        ),
        Finding(
            "turns: largest difference between the same steps of two epochs",
            float(np.abs(first - second).max()),
            0.0,
            -np.inf,
            _TOLERANCE,
        ),
    ]


def _noiseless(privacy: DPSGD) -> DPSGD:
    return dataclasses.replace(
        privacy,
        noise_multiplier=0.0,
        target_epsilon=None,
        clip_learning_rate=0.0,
        augmentations=1,
        spent=Ledger(),
        seed=None,
    )


def _model(rows: int) -> Any:
    number = keras.Input((), dtype="int32", name="tfdist_number")
    table = keras.layers.Embedding(rows, 1, "zeros", name="tfdist_table")
    model = keras.Model(number, table(number), name="tfdist_draws")
    model.compile("sgd", "mse", jit_compile=False)
    return model


def _moved(subject: Any, draws: Draws, **options: Any) -> list[Floats]:
    """Returns the contributions of all examples, for each step."""
    parts: list[Floats] = []
    # Targets are far from the outputs, so that each gradient is clipped.
    y = np.full((draws.num_rows, 1), -10 * norm_of(draws.privacy), np.float32)
    columns = np.arange(draws.num_rows, dtype=np.int32), y, None
    subject.fit(columns, lambda _, v: parts.append(v), batch_size=draws.batch_size, **options)
    return parts
