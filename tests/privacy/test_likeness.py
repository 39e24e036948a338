"""Poisson sampling as another sampler draws: its distribution, its cost, and `fit` with it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from scipy import stats

import tfdist
from tfdist.errors import ArgumentError
from tfdist.privacy import Ledger, Phase, Poisson, PoissonLike
from tfdist.samplers import ClassBalanced, Uniform, Weighted

pytestmark = pytest.mark.quick
# Under the null hypothesis each test below fails with this probability; seeds are fixed.
LEVEL = 1e-4
LABELS = np.repeat([0, 1], [90, 10])


def balanced() -> PoissonLike:
    return PoissonLike(ClassBalanced(labels=LABELS)).bind(None, len(LABELS))


def draws(sampler: Any, steps: int, rows: int, batch: int) -> Any:
    drawn = np.zeros((steps, rows))
    found = sampler.batches(0, steps, num_rows=rows, batch_size=batch, seed=1)
    for step, part in enumerate(found):
        assert len(np.unique(part)) == len(part)
        drawn[step, part] = 1
    return drawn


class TestDistribution:
    def test_each_row_has_its_probability_and_rows_are_independent(self) -> None:
        # Power: a row whose probability is off by 20 % is found with probability 0.99.
        rows, batch, steps = 40, 10, 8000
        weights = np.linspace(0.1, 2.0, rows)
        sampler = PoissonLike(Weighted(weights)).bind(None, rows)
        drawn = draws(sampler, steps, rows, batch)
        q = batch * weights / weights.sum()
        scores = (drawn.sum(0) - steps * q) / np.sqrt(steps * q * (1 - q))
        assert stats.chi2.sf((scores**2).sum(), rows) > LEVEL
        correlated = np.corrcoef(drawn.T)[np.triu_indices(rows, 1)] * np.sqrt(steps)
        assert stats.chi2.sf((correlated**2).sum(), len(correlated)) > LEVEL

    def test_classes_are_balanced(self) -> None:
        drawn = draws(balanced(), 4000, 100, 10)
        for label, q in ((0, 5 / 90), (1, 5 / 10)):
            of_class = drawn[:, label == LABELS]
            count = int(of_class.sum())
            assert stats.binomtest(count, of_class.size, q).pvalue > LEVEL

    def test_no_more_than_always(self) -> None:
        sampler = PoissonLike(Weighted(np.array([1.0, 0, 9]))).bind(None, 3)
        drawn = draws(sampler, 2000, 3, 2)
        assert drawn[:, 2].all()
        assert not drawn[:, 1].any()
        assert sampler.expected_rows(3, 2) == pytest.approx(1.2)
        assert stats.binomtest(int(drawn[:, 0].sum()), 2000, 0.2).pvalue > LEVEL

    def test_equal_weights_are_plain_poisson(self) -> None:
        sampler = PoissonLike(Uniform()).bind(None, 1000)
        settings: dict[str, Any] = {"num_rows": 1000, "batch_size": 30}
        phase = sampler.phase(**settings, steps=5, noise_multiplier=1.0)
        assert phase.sampling_probability == pytest.approx(0.03)
        for step in range(5):
            theirs = Poisson(1000).rows(step, **settings, seed=3)
            np.testing.assert_array_equal(sampler.rows(step, **settings, seed=3), theirs)


def test_costs_what_the_most_frequent_row_does() -> None:
    sampler = balanced()
    phase = sampler.phase(num_rows=100, batch_size=4, steps=20, noise_multiplier=2.0)
    assert phase == Phase(0.2, 2.0, 20, None, 100, at_most=True)
    alike = Phase(0.2, 2.0, 20)
    assert Ledger((phase,)).epsilon(1e-3) == Ledger((alike,)).epsilon(1e-3)
    plain = Phase(0.04, 2.0, 20)
    assert Ledger((phase,)).epsilon(1e-3) > 3 * Ledger((plain,)).epsilon(1e-3)
    assert Ledger.from_dict(Ledger((phase,)).to_dict()) == Ledger((phase,))
    text = tfdist.privacy.statement(Ledger((phase,)), delta=1e-3)
    assert "independently with probability at most 0.2," in text
    assert "such as the size of each class" in text


def problem() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 4)).astype("float32")
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss)
    return model, x, LABELS


def test_fit_equals_steps_by_hand() -> None:
    model, x, y = problem()
    weights, bias = (w.astype("float64") for w in model.get_weights())
    privacy = tfdist.DPSGD(1.0, noise_multiplier=0.0, delta=1e-3, seed=3)
    sampler = PoissonLike(ClassBalanced())
    settings: dict[str, Any] = {"batch_size": 10, "verbose": 0, "seed": 3}
    history = tfdist.fit(model, x, y, sampler=sampler, privacy=privacy, **settings)
    assert history.privacy.ledger.phases == (Phase(0.5, 0.0, 10, None, 100, at_most=True),)
    for step in range(10):
        rows = balanced().rows(step, num_rows=100, batch_size=10, seed=3)
        logits = x[rows] @ weights + bias
        errors = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(2)[y[rows]]
        norms = np.linalg.norm(errors, axis=1) * np.sqrt(1 + (x[rows] ** 2).sum(1))
        errors *= np.minimum(1, 1 / norms)[:, None]
        weights -= 0.5 * x[rows].T @ errors / 10
        bias -= 0.5 * errors.sum(0) / 10
    np.testing.assert_allclose(model.get_weights()[0], weights, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(model.get_weights()[1], bias, rtol=2e-4, atol=1e-6)


def test_the_noise_found_keeps_to_the_target() -> None:
    model, x, y = problem()
    privacy = tfdist.DPSGD(1.0, target_epsilon=2.0, delta=1e-3)
    sampler = PoissonLike(ClassBalanced(alpha=0.5))
    history = tfdist.fit(model, x, y, 10, sampler=sampler, privacy=privacy, verbose=0)
    assert 1.9 < history.privacy.epsilon <= 2.0
    assert history.privacy.ledger.phases[0].at_most


def test_not_a_sampler() -> None:
    with pytest.raises(ArgumentError, match="must be a sampler"):
        PoissonLike("balanced")  # type: ignore[arg-type]


class Unknown(Uniform):
    """Does not know how often it draws a row."""

    def repeats(self, num_rows: int) -> Any:
        return None


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (PoissonLike(Unknown()), {}, "must know how often it draws each row"),
        (PoissonLike(ClassBalanced(alpha=1.0)), {"group_ids": LABELS}, "it draws users, all"),
        (ClassBalanced(), {}, "pass tfdist.privacy.PoissonLike"),
    ],
)
def test_refused(sampler: Any, options: Any, message: str) -> None:
    model, x, y = problem()
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3, **options)
    with pytest.raises(ArgumentError, match=message):
        tfdist.fit(model, x, y, batch_size=10, sampler=sampler, privacy=privacy, verbose=0)
