"""Poisson sampling: its distribution, tested with a stated power, and empty batches in fit."""

from __future__ import annotations

import functools
import time
from typing import Any

import keras
import numpy as np
import pytest
from scipy import stats

import tfdist
from tests.equivalence.cases import mlp, table
from tfdist import data
from tfdist.errors import ArgumentError
from tfdist.privacy import Poisson, capacity
from tfdist.samplers import Sampler
from tfdist.strategies.base import Place

pytestmark = pytest.mark.quick
# Under the null hypothesis each test below fails with this probability; seeds are fixed.
LEVEL = 1e-4


def draw(sampler: Poisson, steps: int, rows: int, batch: int, seed: int = 1) -> list[Any]:
    return sampler.batches(0, steps, num_rows=rows, batch_size=batch, seed=seed)


class TestDistribution:
    @pytest.mark.parametrize(("rows", "batch"), [(1000, 20), (50, 25), (7, 1), (10**6, 30)])
    def test_sizes_are_binomial(self, rows: int, batch: int) -> None:
        # A sampling probability that is wrong by 4 standard errors more than the level asks
        # for is found with probability 1/2: with 2000 steps of 20, by 2 %.
        steps = 2000
        sizes = np.array([len(part) for part in draw(Poisson(), steps, rows, batch)])
        q = batch / rows
        assert stats.binomtest(int(sizes.sum()), steps * rows, q).pvalue > LEVEL
        low, high = (int(stats.binom.ppf(p, rows, q)) for p in (0.02, 0.98))
        edges = np.arange(low, high + 1)
        expected = np.diff(stats.binom.cdf([-1, *edges, rows], rows, q)) * steps
        counts = np.histogram(sizes, [0, *(edges + 1), rows + 1])[0]
        kept = expected > 5
        expected = np.append(expected[kept], expected[~kept].sum())
        counts = np.append(counts[kept], counts[~kept].sum())
        inside = expected > 0
        assert stats.chisquare(counts[inside], expected[inside]).pvalue > LEVEL

    def test_every_row_alike_and_pairs_independent(self) -> None:
        # Power: a row whose probability is off by 20 % of q is found with probability 0.99.
        rows, batch, steps = 40, 10, 8000
        drawn = np.zeros((steps, rows))
        for step, part in enumerate(draw(Poisson(), steps, rows, batch)):
            drawn[step, part] = 1
        q = batch / rows
        scores = (drawn.sum(0) - steps * q) / np.sqrt(steps * q * (1 - q))
        assert stats.chi2.sf((scores**2).sum(), rows) > LEVEL
        correlated = np.corrcoef(drawn.T)[np.triu_indices(rows, 1)] * np.sqrt(steps)
        assert stats.chi2.sf((correlated**2).sum(), len(correlated)) > LEVEL
        # Fixed batches of 10 would have correlations of -1/39: 780 of them, 2.3 errors each.
        assert abs(correlated.mean()) < 4 / np.sqrt(len(correlated))
        over_time = [np.corrcoef(drawn[1:, r], drawn[:-1, r])[0, 1] for r in range(rows)]
        assert abs(np.mean(over_time)) < 4 / np.sqrt(rows * steps)

    def test_more_than_the_capacity_is_a_random_choice(self) -> None:
        rows, batch, steps, room = 30, 15, 6000, 12
        parts = draw(Poisson(room), steps, rows, batch)
        sizes = np.array([len(part) for part in parts])
        assert sizes.max() == room
        truncated = stats.binom.sf(room, rows, 0.5)
        assert (
            stats.binomtest(
                int((sizes == room).sum()), steps, truncated + stats.binom.pmf(room, rows, 0.5)
            ).pvalue
            > LEVEL
        )
        counts = np.bincount(np.concatenate(parts), minlength=rows)
        assert stats.chisquare(counts).pvalue > LEVEL
        assert all(np.all(np.diff(part) > 0) for part in parts)

    def test_ends(self) -> None:
        for batch in (5, 9):
            np.testing.assert_array_equal(draw(Poisson(), 1, 5, batch)[0], np.arange(5))
        assert any(len(part) == 0 for part in draw(Poisson(), 50, 100, 1))
        assert draw(Poisson(), 3, 1, 1) == [[0], [0], [0]]


def test_is_a_function_of_seed_and_step() -> None:
    together = draw(Poisson(), 9, 1000, 30)
    alone = Poisson().rows(7, num_rows=1000, batch_size=30, seed=1)
    np.testing.assert_array_equal(together[7], alone)
    assert list(together[6]) != list(alone)
    assert list(Poisson().rows(7, num_rows=1000, batch_size=30, seed=2)) != list(alone)
    # Known numbers: another version of NumPy must not draw another training run.
    assert list(Poisson(9).rows(3, num_rows=100, batch_size=5, seed=42)) == KNOWN


KNOWN = [15, 34, 65, 70, 78, 91]


def test_ten_million_rows_are_fast() -> None:
    sampler = Poisson()
    sampler.rows(0, num_rows=10**7, batch_size=512, seed=1)
    started = time.process_time()
    draw(sampler, 100, 10**7, 512)
    assert time.process_time() - started < 1.0  # seconds; one pass over the rows takes more


def test_describes_itself_to_the_accountant() -> None:
    settings = {"num_rows": 60000, "batch_size": 256}
    chosen = capacity(num_rows=60000, sampling_probability=256 / 60000)
    assert Poisson().capacity_for(**settings) == chosen
    phase = Poisson(300).phase(**settings, steps=10, noise_multiplier=1.5)
    assert phase == tfdist.privacy.Phase(256 / 60000, 1.5, 10, 300, 60000)
    with pytest.raises(ArgumentError, match="`capacity` must be a whole number of at least 1"):
        Poisson(0)


class Given(Sampler):
    """Some steps with rows, some without."""

    may_be_empty = True

    def __init__(self, *parts: list[int]) -> None:
        self.parts = parts

    def rows(self, step: int, *, num_rows: int, batch_size: int, seed: int) -> Any:
        return np.array(self.parts[step % len(self.parts)], np.int64)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_shares_of_an_empty_batch_have_no_rows(replicas: int) -> None:
    x = np.arange(9.0)
    settings = data.SourceSettings(
        4, 3, Given([], [5, 7], []), shuffle=False, seed=0, training=True
    )
    source = data.read(x, x, None, settings)
    shares = list(source.shares(Place(replicas, 0, replicas)).take(3 * replicas))
    counts = [int(share.rows) for share in shares]
    assert sum(counts[:replicas]) == sum(counts[2 * replicas :]) == 0
    assert sum(counts) == 2
    assert [int(share.total) for share in shares[::replicas]] == [0, 2, 0]
    assert all(len(share.data[0]) == max(1, int(share.rows)) for share in shares)


def normalized(synchronized: bool) -> Any:
    model = keras.Sequential(
        [
            keras.Input((20,)),
            keras.layers.Dense(6),
            keras.layers.BatchNormalization(synchronized=synchronized),
            keras.layers.Dense(4),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


class TestFit:
    @pytest.mark.parametrize(
        "make",
        [
            functools.partial(mlp, "sgd"),
            functools.partial(normalized, True),
            functools.partial(normalized, False),
        ],
    )
    def test_empty_batches_change_nothing(self, make: Any) -> None:
        x, y = table(16)
        weights, losses = [], []
        for parts in ([[3, 5, 7], [1, 2]], [[], [3, 5, 7], [], [1, 2], []]):
            keras.utils.set_random_seed(3)
            model = make()
            model.compile(keras.optimizers.SGD(0.1), loss=model.loss, metrics=["accuracy"])
            options = {"steps_per_epoch": len(parts), "verbose": 0, "seed": 1}
            history = tfdist.fit(model, x, y, 3, sampler=Given(*parts), **options)
            weights.append(model.get_weights())
            losses.append(history.history["loss"][0])
            assert int(model.optimizer.iterations.numpy()) == len(parts)
        for with_empty, without in zip(*weights[::-1], strict=True):
            np.testing.assert_allclose(with_empty, without, atol=1e-6)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_only_empty_batches(self) -> None:
        x, y = table(16)
        model = mlp("sgd")
        before = model.get_weights()
        model.compile(keras.optimizers.SGD(0.1), loss=model.loss)
        tfdist.fit(model, x, y, 3, sampler=Given([]), verbose=0, steps_per_epoch=2)
        for received, expected in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(received, expected)

    def test_a_model_that_was_trained_without_it_goes_on(self) -> None:
        x, y = table(16)
        weights = []
        for sampler in (Given([3, 5, 7], [1, 2]), NeverEmpty([3, 5, 7], [1, 2])):
            keras.utils.set_random_seed(3)
            model = mlp("sgd")
            tfdist.fit(model, x, y, 8, verbose=0, seed=1)
            tfdist.fit(model, x, y, 3, sampler=sampler, verbose=0, seed=1, steps_per_epoch=2)
            weights.append(model.get_weights())
        for received, expected in zip(*weights, strict=True):
            np.testing.assert_allclose(received, expected, atol=1e-6)

    def test_poisson_trains(self) -> None:
        x, y = table(200)
        model = mlp("sgd")
        history = tfdist.fit(model, x, y, 20, epochs=5, sampler=Poisson(), verbose=0, seed=1)
        assert history.history["loss"][-1] < history.history["loss"][0]


class NeverEmpty(Given):
    may_be_empty = False
