"""The audit: its bounds hold, and private training that is broken does not pass."""

from __future__ import annotations

import dataclasses
import doctest
import math
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.parameters import in_part
from tfdist.errors import ArgumentError, MissingPackageError
from tfdist.privacy import (
    AuditReport,
    Ledger,
    audit,
    audits,
    canaries,
    epsilon,
    epsilon_lower_bound,
    gaussian_lower_bound,
)
from tfdist.privacy.accounting.ledger import Phase
from tfdist.privacy.audit_scores import bounds, membership, tradeoffs
from tfdist.privacy.audit_scores.bounds import clopper_pearson, p_value
from tfdist.privacy.audit_scores.tradeoffs import (
    curve_of,
    curve_of_ledger,
    gaussian_epsilon,
    p_value_of,
)

DELTA = 1e-5


def bound(num_canaries: int, guesses: int, right: int, delta: float, **options: Any) -> float:
    return epsilon_lower_bound(
        num_canaries=num_canaries, guesses=guesses, right=right, delta=delta, **options
    )


# --- the theorem ------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("num_canaries", "guesses", "right", "delta", "printed"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_is_that_of_the_paper(
    num_canaries: int, guesses: int, right: int, delta: float, printed: float
) -> None:
    # Appendix D and section 7; one number is rounded there, the other cut off.
    assert bound(num_canaries, guesses, right, delta) == pytest.approx(printed, abs=1e-3)


@pytest.mark.quick
@pytest.mark.parametrize("guesses", [1, 5, 100, 3000])
def test_all_right_without_delta_has_a_closed_form(guesses: int) -> None:
    accuracy = 0.05 ** (1 / guesses)
    expected = max(0.0, math.log(accuracy / (1 - accuracy)))
    assert bound(5000, guesses, guesses, 0.0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.quick
def test_what_shows_nothing() -> None:
    assert bound(100, 100, 50, 0.0) == 0
    assert bound(100, 0, 0, 0.0) == 0
    assert bound(4, 4, 4, 0.0) == 0  # 1 / 16 is above 5 %
    assert bound(100, 100, 100, 1.0) == 0
    assert p_value(num_canaries=9, guesses=3, right=0, epsilon=0.0, delta=0.0) == 1


@pytest.mark.quick
@pytest.mark.parametrize("guarantee", [0.0, 0.7, 3.0])
def test_the_p_value_is_the_sum_it_stands_for(guarantee: float) -> None:
    guesses, right, num_canaries, delta = 12, 9, 40, 1e-3
    accuracy = math.exp(guarantee) / (1 + math.exp(guarantee))
    chance = [
        math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k)
        for k in range(guesses + 1)
    ]
    worst = max(sum(chance[right - i : right]) / i for i in range(1, right + 1))
    expected = sum(chance[right:]) + 2 * num_canaries * delta * worst
    received = p_value(
        num_canaries=num_canaries, guesses=guesses, right=right, epsilon=guarantee, delta=delta
    )
    assert received == pytest.approx(min(1.0, expected), rel=1e-9)


@pytest.mark.quick
def test_the_bound_grows_and_falls_as_it_must() -> None:
    assert bound(100, 100, 90, 0.0) < bound(100, 100, 95, 0.0)
    assert bound(100, 100, 95, 1e-3) < bound(100, 100, 95, 0.0)
    assert bound(100, 100, 95, 0.0, confidence=0.99) < bound(100, 100, 95, 0.0)
    assert bound(1000, 100, 95, 1e-4) < bound(100, 100, 95, 1e-4)


def at_most_5_percent(exceeded: int, runs: int) -> bool:
    """Tells whether so many errors are no surprise: they have a probability of 1e-4."""
    from scipy import stats

    return bool(stats.binom.sf(exceeded - 1, runs, 0.05) > 1e-4)


@pytest.mark.quick
def test_randomized_response_exceeds_the_bound_as_rarely_as_promised() -> None:
    rng = np.random.default_rng(1)
    known, num, runs = 1.0, 300, 1000
    kept = rng.random((runs, num)) < 1 / (1 + math.exp(-known))
    counts, repeats = np.unique(kept.sum(1), return_counts=True)
    received = np.array([bound(num, num, int(right), 0.0) for right in counts])
    assert at_most_5_percent(int(repeats[received > known].sum()), runs)
    assert np.average(received, weights=repeats) > 0.7 * known  # and it is no idle bound
    # The same events would refute what claims less.
    assert repeats[received > 0.5 * known].sum() > 0.95 * runs


def test_chosen_numbers_of_guesses_keep_the_confidence() -> None:
    rng = np.random.default_rng(2)
    known, num, runs = 1.0, 200, 150
    found = []
    for _ in range(runs):
        included = rng.random(num) < 0.5
        # Laplace's mechanism: whatever is made of these scores is `known`-private.
        scores = included + rng.laplace(scale=1 / known, size=num)
        found.append(AuditReport(scores, included, True).epsilon_lower_bound(0.0))
    assert at_most_5_percent(sum(b > known for b in found), runs)
    assert max(found) > 0.5


def test_a_leak_with_a_probability_of_delta_is_allowed() -> None:
    rng = np.random.default_rng(3)
    delta, num, runs = 0.02, 100, 1000
    leaks = rng.random((runs, num)) < delta
    right = (leaks | (rng.random((runs, num)) < 0.5)).sum(1)
    exceeded = sum(bound(num, num, int(r), delta) > 0 for r in right)
    assert at_most_5_percent(exceeded, runs)


@pytest.mark.quick
def test_intervals_of_clopper_and_pearson() -> None:
    from scipy import stats

    counts = np.arange(21)
    low, high = clopper_pearson(counts, 20, 0.9)
    for count in counts:
        expected = stats.binomtest(int(count), 20).proportion_ci(0.9, method="exact")
        assert (low[count], high[count]) == pytest.approx(tuple(expected), abs=1e-12)


# --- the theorem for whole curves -------------------------------------------------------


def largest_tail(epsilons: Any, deltas: Any, canaries: int, guesses: int, right: int) -> float:
    """The most that theorem 9 of Mahloujifar et al. allows, by linear programming."""
    from scipy import optimize

    limits, above = [], []
    counts = np.arange(guesses + 1)
    for least in range(1, guesses + 1):
        hits = np.where(counts >= least, counts, 0) / canaries
        misses = np.where(counts >= least - 1, guesses - counts, 0) / canaries
        for grows, delta in zip(np.exp(epsilons), deltas, strict=True):
            limits += [hits - grows * misses, grows * hits - misses]
            above += [delta, delta + grows - 1]
    found = optimize.linprog(
        -(counts >= right).astype(float),
        A_ub=limits,
        b_ub=above,
        A_eq=[np.ones(guesses + 1)],
        b_eq=[1],
    )
    return float(-found.fun)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("epsilons", "deltas", "num_canaries", "guesses", "right"),
    [
        ([0.5], [0.0], 20, 20, 15),
        ([1.0], [1e-2], 30, 12, 11),
        ([0.2, 1.0], [0.05, 1e-3], 25, 25, 18),
        ([0.0], [0.1], 15, 10, 9),
    ],
)
def test_what_a_curve_allows_is_found_by_linear_programming_too(
    epsilons: Any, deltas: Any, num_canaries: int, guesses: int, right: int
) -> None:
    expected = largest_tail(epsilons, deltas, num_canaries, guesses, right)
    for factor, refuted in ((0.999, False), (1.001, True)):
        found = tradeoffs.is_refuted(
            curve_of(epsilons, deltas),
            num_canaries=num_canaries,
            guesses=guesses,
            right=right,
            error=np.array([factor * expected]),
        )
        assert found.tolist() == [refuted]
    counts = {"num_canaries": num_canaries, "guesses": guesses, "right": right}
    received = p_value_of(curve_of(epsilons, deltas), **counts)
    assert expected <= received < expected + 0.011


@pytest.mark.quick
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_the_bound_of_a_gaussian_mechanism_holds_and_is_the_larger_one(mu: float) -> None:
    rng = np.random.default_rng(1)
    num, each, runs = 1000, 100, 300
    counts = []
    for _ in range(runs):
        included = rng.random(num) < 0.5
        order = np.argsort(included * mu + rng.normal(size=num))
        counts.append(included[order[-each:]].sum() + (~included[order[:each]]).sum())
    values, repeats = np.unique(counts, return_counts=True)
    given = [{"num_canaries": num, "guesses": 2 * each, "right": int(n)} for n in values]
    received = np.array([gaussian_lower_bound(**one) for one in given])
    assert at_most_5_percent(int(repeats[received > mu].sum()), runs)
    assert np.average(received, weights=repeats) > 0.5 * mu
    for one, bound_of_mu in zip(given, received, strict=True):
        assert gaussian_epsilon(bound_of_mu, DELTA) > epsilon_lower_bound(**one, delta=DELTA)


@pytest.mark.quick
def test_a_gaussian_mechanism_and_its_ledger_have_one_curve() -> None:
    from scipy import special

    y = np.array([1e-4, 0.01, 0.2, 0.5, 0.9, 0.999])
    ledger = Ledger((Phase(1.0, 4.0, 16),))  # mu = 1, by composition
    received = curve_of_ledger(ledger)(y)
    expected = special.ndtr(special.ndtri(y) - 1.0)
    assert (received <= expected + 1e-9).all()
    np.testing.assert_allclose(received, expected, rtol=0.05, atol=1e-7)
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(ledger.epsilon(1e-5), rel=1e-3)
    assert curve_of_ledger(Ledger((Phase(1.0, 0.0, 1),)))(y).max() == 0


@pytest.mark.quick
def test_a_ledger_is_refuted_as_rarely_as_its_p_value_says() -> None:
    rng = np.random.default_rng(2)
    ledger = Ledger((Phase(1.0, 1.0, 1),))
    found = []
    for _ in range(25):
        included = rng.random(400) < 0.5
        scores = included + rng.normal(size=400)
        found.append(AuditReport(scores, included, True).p_value(ledger))
    assert at_most_5_percent(sum(p < 0.05 for p in found), len(found))
    included = rng.random(1000) < 0.5
    scores = included + rng.normal(size=1000) / 4  # a quarter of the noise
    broken = AuditReport(scores, included, True)
    assert broken.p_value(ledger) < 1e-3
    # All numbers of guesses together: 7 of them, at both ends and at either.
    ends = [(n, n) for n in (500, 250, 125, 62, 31, 15, 7)]
    ends += [pair for n, _ in ends for pair in ((n, 0), (0, n))]
    each = [broken.p_value(ledger, guesses=pair) for pair in ends]
    assert broken.p_value(ledger) == pytest.approx(21 * min(each))
    assert broken.gaussian_lower_bound(DELTA) > broken.epsilon_lower_bound(DELTA)


# --- scores -----------------------------------------------------------------------------


def report(members: Any, others: Any, fair_coins: bool = False) -> AuditReport:
    included = np.repeat([True, False], [len(members), len(others)])
    return AuditReport(np.concatenate([members, others]), included, fair_coins)


@pytest.mark.quick
def test_auc_and_advantage_are_those_of_scikit_learn() -> None:
    from sklearn import metrics

    rng = np.random.default_rng(0)
    # Rounded, so that many are equal.
    found = report(rng.normal(1, size=300).round(1), rng.normal(size=200).round(1))
    assert found.auc == pytest.approx(metrics.roc_auc_score(found.included, found.scores))
    false, true, _ = metrics.roc_curve(found.included, found.scores, drop_intermediate=False)
    received = found.roc()
    np.testing.assert_allclose(received[0], false, atol=1e-12)
    np.testing.assert_allclose(received[1], true, atol=1e-12)
    assert found.advantage == pytest.approx((true - false).max())
    assert found.true_positive_rate(0.1) == pytest.approx(true[false <= 0.1].max())


@pytest.mark.quick
def test_certainty_and_ignorance() -> None:
    sure = report(np.full(500, 1.0), np.full(500, -1.0), fair_coins=True)
    assert (sure.auc, sure.advantage, sure.true_positive_rate(0.0)) == (1.0, 1.0, 1.0)
    assert sure.threshold_attack(0.0).epsilon > 3
    assert sure.epsilon_lower_bound(0.0) > 4
    equal = report(np.zeros(500), np.zeros(500), fair_coins=True)
    assert (equal.auc, equal.advantage) == (0.5, 0.0)
    assert equal.epsilon_lower_bound(0.0) == 0
    assert equal.threshold_attack(0.0).epsilon == 0


@pytest.mark.quick
def test_equal_scores_give_nothing_away() -> None:
    included = np.arange(100) % 2 == 0
    for order in (included, ~included):
        found = AuditReport(np.zeros(100), order, fair_coins=True)
        for guesses in ((30, 30), (50, 50), (50, 0)):
            assert found.epsilon_lower_bound(0.0, guesses=guesses) == 0


@pytest.mark.quick
@pytest.mark.parametrize("guesses", [(100, 100), (60, 140), (150, 0), (0, 150)])
def test_the_highest_scores_are_guessed_members_and_the_lowest_not(guesses: Any) -> None:
    rng = np.random.default_rng(1)
    included = rng.random(400) < 0.5
    scores = included + rng.normal(size=400)
    highest, lowest = guesses
    ranked = [member for _, member in sorted(zip(scores, included, strict=True))]
    right = sum(ranked[400 - highest :]) + sum(not member for member in ranked[:lowest])
    expected = epsilon_lower_bound(
        num_canaries=400, guesses=highest + lowest, right=int(right), delta=0.0
    )
    found = AuditReport(scores, included, fair_coins=True)
    assert expected > 0.5
    assert found.epsilon_lower_bound(0.0, guesses=guesses) == expected


def test_a_threshold_attack_of_independent_scores_keeps_its_confidence() -> None:
    rng = np.random.default_rng(4)
    known, runs, exceeded, found = 0.5, 150, 0, []
    for _ in range(runs):
        members = 1 + rng.laplace(scale=1 / known, size=200)
        attack = report(members, rng.laplace(scale=1 / known, size=200)).threshold_attack(0.0)
        exceeded += attack.epsilon > known
        found.append(attack)
    assert at_most_5_percent(exceeded, runs)
    assert {attack.says_member for attack in found} == {True, False}
    assert any(attack.epsilon > 0.1 for attack in found)


@pytest.mark.quick
def test_a_bound_needs_fair_coins() -> None:
    found = report(np.ones(30), np.zeros(30))
    with pytest.raises(ArgumentError, match="included by a fair coin of its own"):
        found.epsilon_lower_bound(DELTA)
    assert "fair coins" not in str(found)
    assert str(dataclasses.replace(found, fair_coins=True)).endswith("by fair coins")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AuditReport(np.zeros(3), np.ones(3, bool)), "members and non-members"),
        (lambda: AuditReport(np.zeros(3), np.ones(2, bool)), "one number for each example"),
        (lambda: report([math.nan], [0.0]), "1 NaN of 2"),
        (lambda: report(np.ones(9), np.zeros(9)).threshold_attack(0.0), "at least 20"),
        (lambda: report([1], [0], True).epsilon_lower_bound(0.0, guesses=(2, 1)), "`guesses`"),
        (lambda: bound(10, 5, 6, 0.0), "`right` must be at most `guesses`"),
        (lambda: bound(10, 5, 5, 1.5), "`delta` must be a number"),
        (lambda: bound(10, 5, 5, 0.0, confidence=1.0), "`confidence` must be a number"),
    ],
)
def test_what_cannot_be_audited(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.quick
def test_a_picture() -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    found = report(np.append(rng.normal(1, size=50), -math.inf), rng.normal(size=60))
    curve, counts = found.plot().axes
    assert curve.get_xlabel() == "false positive rate"
    assert f"{found.auc:.3f}" in curve.get_legend().get_texts()[0].get_text()
    assert sum(bar.get_height() for bar in counts.patches) == 110


@pytest.mark.quick
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy

    monkeypatch.delattr(scipy, "special", raising=False)
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(MissingPackageError, match="SciPy"):
        bound(10, 5, 5, 0.0)


def test_examples_of_the_docstrings() -> None:
    for module in (bounds, membership, audits, tradeoffs):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


# --- canaries and losses ----------------------------------------------------------------


@pytest.mark.quick
def test_canaries_are_left_out_by_fair_coins() -> None:
    x = {"a": np.arange(1000), "b": np.arange(1000) * 2.0}
    y = np.arange(1000) + 5
    made = canaries(x, y, rows=400, seed=3)
    assert len(np.unique(made.rows)) == 400
    assert 150 < made.included.sum() < 250
    expected = np.setdiff1d(np.arange(1000), made.rows[~made.included])
    np.testing.assert_array_equal(made.x["a"], expected)
    np.testing.assert_array_equal(made.x["b"], 2.0 * expected)
    np.testing.assert_array_equal(made.y, expected + 5)
    np.testing.assert_array_equal(made.canary_x["a"], made.rows)
    again = canaries(x, y, rows=400, seed=3)
    np.testing.assert_array_equal(again.included, made.included)
    own = [canaries(x, y, rows=made.rows) for _ in range(2)]
    np.testing.assert_array_equal(own[0].rows, made.rows)
    assert (own[0].included != own[1].included).any()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (1, "`rows` must be a whole number"),
        (11, "at most the number of rows, 10"),
        ([1, 1, 2], "at least two different row numbers below 10"),
        ([1, 10], "at least two different"),
        ([0.5, 1.0], "at least two different"),
    ],
)
def test_rows_that_cannot_be_canaries(rows: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        canaries(np.zeros(10), np.zeros(10), rows)


@pytest.mark.parametrize("loss", ["mse", "own"])
def test_scores_are_losses_of_single_examples(loss: str) -> None:
    def own(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.max(keras.ops.abs(y_true - y_pred))  # one number of all examples

    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(11, n)).astype("float32") for n in (4, 3))
    dense = keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(5.0))
    model = keras.Sequential([keras.Input((4,)), dense, keras.layers.Dropout(0.5)])
    model.compile(loss=own if loss == "own" else loss, metrics=["mae"])
    before = [m.numpy() for m in model.metrics_variables]
    found = audit(model, (x[:7], y[:7]), (x[7:], y[7:]), batch_size=3)
    error = np.abs(dense(x).numpy() - y)
    expected = error.max(1) if loss == "own" else (error**2).mean(1)
    np.testing.assert_allclose(found.scores, -expected, rtol=1e-5)
    assert found.included.tolist() == [True] * 7 + [False] * 4
    for variable, value in zip(model.metrics_variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    other.compile(loss="mse")
    relative = audit(model, (x[:7], y[:7]), (x[7:], y[7:]), reference=other)
    mine = audit(other, (x[:7], y[:7]), (x[7:], y[7:]))
    np.testing.assert_allclose(relative.scores, found.scores - mine.scores, rtol=1e-4)


def test_a_score_of_ones_own_and_several_inputs_and_outputs() -> None:
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    model = keras.Model([a, b], [keras.layers.Dense(1)(a), keras.layers.Dense(2)(b)])
    x = (np.ones((5, 2), "float32"), np.ones((5, 3), "float32"))
    y = (np.zeros((5, 1), "float32"), np.zeros((5, 2), "float32"))
    with pytest.raises(ArgumentError, match="compiled with a loss"):
        audit(model, (x, y), (x, y))
    found = audit(model, (x, y), (x, y), score=lambda m, x, y: np.arange(len(y[0])))
    assert found.scores.tolist() == [0, 1, 2, 3, 4] * 2
    model.compile(loss=["mse", "mae"])
    found = audit(model, (x, y), (x, y))
    one, two = (out.numpy() for out in model(list(x)))
    np.testing.assert_allclose(
        -found.scores[:5], (one**2).mean(1) + np.abs(two).mean(1), rtol=1e-5
    )


@pytest.mark.quick
def test_members_and_non_members_are_both_needed() -> None:
    pair = (np.zeros((2, 1)), np.zeros((2, 1)))
    with pytest.raises(ArgumentError, match=r"`non_members` must be a pair \(x, y\)"):
        audit(None, pair)
    with pytest.raises(ArgumentError, match="must be None with Canaries"):
        audit(None, canaries(*pair, rows=2), pair)


# --- training that is private, and training that only claims to be --------------------------


NOISE, STEPS, CANARIES = 4.0, 5, 1000
CLAIMED = epsilon(sampling_probability=1.0, noise_multiplier=NOISE, steps=STEPS, delta=DELTA)


def too_little_on_each_replica(patch: pytest.MonkeyPatch) -> None:
    """Lets 16 replicas add noise of 1 / 16 each, where 1 / sqrt(16) were right."""
    from tfdist.privacy.mechanism.noise import Noise

    normal = Noise.normal
    patch.setattr(Noise, "normal", lambda *arguments: normal(*arguments) / 4)


def clipped_after_the_sum(patch: pytest.MonkeyPatch) -> None:
    """Clips the mean of a batch, as an optimizer's `global_clipnorm` would."""

    def share(
        model: Any, columns: Any, batch: Any, mechanism: Any, norm: float, *rest: Any
    ) -> Any:
        x, y, weight = columns
        variables = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = model.compute_loss(x, y, outputs, sample_weight=weight)
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, variables), norm)
        return outputs, [g * mechanism.expected_batch for g in gradients], tf.constant(0.0)

    patch.setattr("tfdist.privacy.mechanism.step.clipped_share", share)


def audited(noise: float) -> AuditReport:
    """Audits a `fit` in which each canary has a weight of its own to be learnt by."""
    x, y = np.eye(CANARIES, dtype="float32"), np.ones((CANARIES, 1), "float32")
    made = canaries(x, y, rows=CANARIES)
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((CANARIES,)), layer])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    privacy = tfdist.DPSGD(1.0, noise_multiplier=noise, delta=DELTA)
    count = len(made.x)
    options = {"batch_size": count, "epochs": STEPS, "verbose": 0, "privacy": privacy}
    history = tfdist.fit(model, made.x, made.y, sample_weight=np.full(count, 100.0), **options)
    (phase,) = history.privacy.ledger.phases
    # Whatever was really added, this is what is claimed.
    claimed = Ledger((dataclasses.replace(phase, noise_multiplier=NOISE),))
    assert claimed.epsilon(DELTA) == pytest.approx(CLAIMED, rel=1e-3)
    return audit(model, made, score=lambda model, x, y: model(x)[:, 0])


def test_private_training_stays_under_its_epsilon() -> None:
    found = audited(NOISE)
    assert found.auc > 0.55  # the attack is a good one
    assert 0 < found.epsilon_lower_bound(DELTA) < CLAIMED


@pytest.mark.parametrize(
    "broken",
    [None, too_little_on_each_replica, clipped_after_the_sum],
    ids=["no noise", "too little noise on each replica", "clipped after the sum"],
)
def test_broken_training_is_caught(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken is not None:
        broken(monkeypatch)
    found = audited(NOISE if broken else 0.0)
    assert found.epsilon_lower_bound(DELTA) > CLAIMED


@pytest.mark.parametrize("noise", in_part([40.0, 0.0], full=[40.0]))
def test_wrong_labels_of_digits(noise: float) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    rows = rng.choice(len(x), 600, replace=False)
    y[rows] = (y[rows] + rng.integers(1, 10, len(rows))) % 10
    made = canaries((x / 16).astype("float32"), y, rows)
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(256, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    privacy = tfdist.DPSGD(1.0, noise_multiplier=noise, delta=DELTA)
    options = {"batch_size": 512, "verbose": 0, "privacy": privacy}
    epochs = 5 if noise else 60
    ledger = tfdist.fit(model, made.x, made.y, epochs=epochs, **options).privacy.ledger
    phase = dataclasses.replace(ledger.phases[0], noise_multiplier=40.0)
    found = audit(model, made)
    claimed = Ledger((phase,)).epsilon(DELTA)
    assert (found.epsilon_lower_bound(DELTA) > claimed) == (noise == 0)
