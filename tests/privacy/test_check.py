"""The check of the mechanism: it finds what was broken on purpose, and nothing else."""

from __future__ import annotations

import doctest
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import ArgumentError
from tfdist.privacy import check
from tfdist.privacy.checking import checking
from tfdist.privacy.checking.draw_tests import draw_facts
from tfdist.privacy.checking.noise_tests import Block, noise_facts, smallest_error
from tfdist.privacy.checking.report import CheckReport, Finding

L = keras.layers
ALPHA = 1e-6
PRIVACY = tfdist.DPSGD(0.5, noise_multiplier=2.0, delta=1e-4)


def table(*shape: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(100, *shape)).astype("float32"), rng.integers(0, 3, 100)


def classifier(*layers: Any, shape: tuple[int, ...] = (8,), **options: Any) -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input(shape), *layers, L.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], **options)
    return model


def measured(model: Any, x: Any, y: Any, privacy: Any = PRIVACY, **options: Any) -> CheckReport:
    return check(model, x, y, privacy, batch_size=10, effort=0.1, **options)


def failed(report: CheckReport) -> set[str]:
    return {fact.name for fact in report.failures}


# --- statistics -------------------------------------------------------------------------


def names(facts: list[Finding]) -> set[str]:
    return {fact.name for fact in facts if not fact.passed}


BLOCKS = (Block("a", slice(0, 300)), Block("b", slice(300, 600)))


@pytest.mark.quick
def test_statistics_raise_alarms_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    alpha, runs = 0.02, 150
    counts: dict[str, int] = {}
    for _ in range(runs):
        facts = noise_facts(rng.normal(size=(16, 600)), BLOCKS, alpha)
        facts += draw_facts(rng.random((40, 120)) < 0.1, 0.1, alpha)
        for fact in facts:
            counts[fact.name] = counts.get(fact.name, 0) + (not fact.passed)
    assert len(counts) == 16
    assert max(counts.values()) <= 12  # of 150 with 2 %, more have a probability of 1e-5
    assert sum(counts.values()) >= 10


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda z: z * 0.97, "noise: standard deviation over the right one"),
        (lambda z: z + 0.1, "noise: mean 0, p-value"),
        (lambda z: z * np.repeat([1, 0.7], 300), "noise: standard deviation of each variable"),
        (lambda z: np.vstack([z[:-1], z[:1]]), "noise: independent between steps"),
        (lambda z: np.vstack([z[:-1], -z[:1]]), "noise: independent between steps"),
        (lambda z: z + 0.1 * np.roll(z, 1, 0), "noise: nothing left of the 8 steps before"),
        (lambda z: np.hstack([z[:, :300]] * 2), "noise: independent between variables"),
        (lambda z: np.clip(z, -2.2, 2.2), "noise: tails"),
        (lambda z: np.sign(z) * np.abs(z) ** 1.1, "noise: normal"),
    ],
)
def test_noise_that_is_wrong_in_one_way(change: Any, expected: str) -> None:
    z = np.random.default_rng(0).normal(size=(64, 600))
    assert not names(noise_facts(z, BLOCKS, ALPHA))
    assert any(
        name.startswith(expected) for name in names(noise_facts(change(z), BLOCKS, ALPHA))
    )


@pytest.mark.quick
def test_the_grid_of_the_noise_is_no_fault() -> None:
    rng = np.random.default_rng(0)
    blocks = (Block("all", slice(0, 400)),)
    found = []
    for _ in range(10):
        z = np.round(rng.normal(size=(100, 400)) * 64) / 64
        facts = noise_facts(z, blocks, ALPHA)
        found += [fact.measured for fact in facts if fact.name.startswith("noise: normal")]
    assert np.median(found) > 0.2  # a probability; of the bare grid it is a tenth


@pytest.mark.quick
def test_the_power_is_what_it_says() -> None:
    from scipy import stats

    count = 16 * 600
    z = np.random.default_rng(0).normal(size=(16, 600))
    lowest = noise_facts(z, BLOCKS, 1e-3)[0].lowest
    scale = 1 - smallest_error(count, 1e-3)
    missed = stats.chi2.sf(count * (lowest / scale) ** 2, count)
    assert missed == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.quick
def test_draws_that_are_wrong_in_one_way() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.random((60, 400)) < 0.1
    assert not names(draw_facts(drawn, 0.1, ALPHA))
    assert "draws: of each example, binomial, p-value" in names(draw_facts(drawn, 0.15, ALPHA))
    favoured = drawn.copy()
    favoured[:, 3] |= rng.random(60) < 0.5
    assert "draws: the least probable, p-value" in names(draw_facts(favoured, 0.1, ALPHA))
    again = drawn.copy()
    again[30:] = drawn[:30]
    assert "draws: independent between steps, p-value" in names(draw_facts(again, 0.1, ALPHA))
    twice = drawn.copy()
    twice[7] = drawn[45]
    assert "draws: independent between steps, p-value" in names(draw_facts(twice, 0.1, ALPHA))
    pairs = np.repeat(drawn[:, :100], 2, axis=1)
    expected = "draws: independent between examples, p-value"
    assert expected in names(draw_facts(pairs, 0.1, ALPHA))


# --- a sound mechanism ------------------------------------------------------------------


def test_a_sound_mechanism_passes_and_the_model_stays_as_it_was() -> None:
    x, y = table(8)
    model = classifier(L.Dense(60, activation="tanh", kernel_regularizer="l2"))
    first = tfdist.fit(model, x, y, batch_size=10, verbose=0, privacy=PRIVACY)
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = [v.numpy() for v in variables]
    optimizer, state = model.optimizer, np.random.get_state()[1].copy()
    report = measured(model, x, y)
    assert report.passed, report
    assert str(report).count("\n") == len(report.facts)
    assert model.optimizer is optimizer
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    # No step of the check is in the ledger.
    second = tfdist.fit(model, x, y, batch_size=10, verbose=0, privacy=PRIVACY)
    assert second.privacy.ledger.steps == 2 * first.privacy.ledger.steps


@pytest.mark.parametrize(
    ("privacy", "part"),  # the part that the mechanism changes
    [
        pytest.param(
            *(
                tfdist.DPSGD(0.5, noise_multiplier=2.0, delta=1e-4, clipping="per_layer"),
                "noise",
            ),
            marks=pytest.mark.full,
        ),
        pytest.param(
            *(
                tfdist.DPSGD(
                    0.5, noise_multiplier=2.0, delta=1e-4, target_quantile=0.5, count_noise=1.5
                ),
                "noise",
            ),
            marks=pytest.mark.full,
        ),
        (
            tfdist.DPSGD(
                0.5,
                noise_multiplier=2.0,
                delta=1e-4,
                group_ids=np.arange(100) % 40,
                max_rows_per_group=2,
            ),
            "draws",
        ),
        (tfdist.DPFTRL(0.5, noise_multiplier=2.0, delta=1e-4, bands=4), "draws"),
        pytest.param(
            *(tfdist.DPFTRL(0.5, noise_multiplier=2.0, delta=1e-4, bands=4), "noise"),
            marks=pytest.mark.full,
        ),
    ],
    ids=["per_layer", "adaptive", "users", "in_turn", "noise in turn"],
)
def test_other_mechanisms_pass(privacy: Any, part: str) -> None:
    report = measured(classifier(L.Dense(60)), *table(8), privacy, parts=[part])
    assert report.passed, report


# --- planted faults ---------------------------------------------------------------------


def times(patch: pytest.MonkeyPatch, factor: float) -> None:
    from tfdist.privacy.mechanism.noise import Noise

    normal = Noise.normal
    patch.setattr(Noise, "normal", lambda *given: normal(*given) * factor)


def the_same_in_every_step(patch: pytest.MonkeyPatch) -> None:
    from tfdist.privacy.mechanism.noise import Noise

    normal = Noise.normal
    patch.setattr(
        Noise,
        "normal",
        lambda self, count, replica, step: normal(self, count, replica, 0 * step),
    )


def the_same_in_every_fit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("secrets.randbits", lambda bits: 7)


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lambda patch: times(patch, 0.5**0.5), "noise: standard deviation over the right one"),
        pytest.param(  # the next one is of the same kind
            the_same_in_every_step,
            "noise: independent between steps, p-value",
            marks=pytest.mark.full,
        ),
        (the_same_in_every_fit, "noise: independent between steps, p-value"),
    ],
    ids=["by the root of 2", "repeated", "repeated by a second fit"],
)
def test_wrong_noise_is_found(
    plant: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    report = measured(classifier(L.Dense(60)), *table(8), parts=["noise"])
    assert expected in failed(report), report


@pytest.mark.full
def test_wrong_noise_on_the_count_within_the_norm_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tfdist.privacy.mechanism.adaptive import AdaptiveClip

    with_noise = AdaptiveClip.with_noise
    monkeypatch.setattr(
        AdaptiveClip,
        "with_noise",
        lambda self, votes, drawn: with_noise(self, votes, drawn / 2),
    )
    settings: Any = {"target_quantile": 0.5, "count_noise": 1.5}
    privacy = tfdist.DPSGD(0.5, noise_multiplier=2.0, delta=1e-4, **settings)
    report = measured(classifier(), *table(8), privacy, parts=["noise"])
    expected = "noise: standard deviation over the right one, of the count within the norm"
    assert failed(report) == {expected}
    assert report[expected].measured == pytest.approx(0.5, rel=0.2)


def test_clipping_to_twice_the_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tfdist.privacy.mechanism import step

    share = step.clipped_share

    def doubled(*given: Any, **options: Any) -> Any:
        outputs, sums, votes = share(*given, **options)
        return outputs, [2 * s for s in sums], votes

    monkeypatch.setattr(step, "clipped_share", doubled)
    report = measured(classifier(), *table(8), parts=["contributions"])
    assert report["contribution"].measured == pytest.approx(2, rel=1e-3)
    assert "contribution: largest found over l2_norm_clip" in failed(report)


@pytest.mark.full  # test_clipping.py has such rows
def test_an_example_without_a_finite_gradient_that_is_not_left_out_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tfdist.privacy.mechanism import step

    share = step.clipped_share

    def spoilt(model: Any, columns: Any, *rest: Any) -> Any:
        outputs, sums, votes = share(model, columns, *rest)
        return outputs, [s + 0 * tf.reduce_sum(columns[0]) for s in sums], votes

    monkeypatch.setattr(step, "clipped_share", spoilt)
    report = measured(classifier(), *table(8), parts=["contributions"])
    assert np.isnan(report["contribution"].measured)
    assert np.isnan(report["neighbours: largest change"].measured)
    assert not report.passed


def test_shuffled_batches_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tfdist.privacy import Poisson
    from tfdist.samplers import Uniform

    def rows(self: Any, step: int, **given: Any) -> Any:
        return Uniform().rows(step, **given)

    monkeypatch.setattr(Poisson, "rows", rows)
    report = measured(classifier(), *table(8), parts=["draws"])
    assert "draws: of each example, binomial, p-value" in failed(report)
    assert "draws: independent between steps, p-value" in failed(report)


def test_division_by_the_batch_that_came_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tfdist.privacy.mechanism import step

    share = step.clipped_share

    def divided(model: Any, columns: Any, batch: Any, *rest: Any) -> Any:
        outputs, sums, votes = share(model, columns, batch, *rest)
        rows = tf.maximum(tf.cast(batch.rows, tf.float32), 1.0)
        return outputs, [s * 10.0 / rows for s in sums], votes

    monkeypatch.setattr(step, "clipped_share", divided)
    report = measured(classifier(), *table(8), parts=["draws"])
    # The mean may be right by chance; not so the largest part, of a batch that was small.
    assert "draws: largest part of an example in a step, in units of the right one" in failed(
        report
    )


class Centre(L.Layer):
    """Takes the mean of the batch away: every example moves every other."""

    def call(self, x: Any, training: bool = False) -> Any:
        return x - tf.reduce_mean(x, 0, keepdims=True) if training else x


def test_a_layer_that_mixes_examples_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the refusal of `fit` itself.
    monkeypatch.setattr("tfdist.privacy.run.PrivateRun._try", lambda *given: None)
    report = measured(classifier(Centre()), *table(8), parts=["contributions"])
    assert {name.partition(":")[0] for name in failed(report)} == {"neighbours"}
    assert len(report.failures) == 2
    assert report["neighbours: largest change"].measured > 2


# --- arguments --------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"privacy": None}, "`privacy` must be a tfdist.DPSGD or tfdist.DPFTRL"),
        ({"model": keras.Sequential([keras.Input((8,))])}, "`model` must be a compiled"),
        ({"x": tf.data.Dataset.range(3)}, "`x` must be arrays"),
        ({"effort": 0}, "`effort` must be a number above 0"),
        ({"parts": ["noises"]}, "`parts` must be"),
    ],
)
def test_what_cannot_be_checked(change: Any, message: str) -> None:
    x, y = table(8)
    given = {"model": classifier(), "x": x, "y": y, "privacy": PRIVACY, **change}
    with pytest.raises(ArgumentError, match=message):
        check(**given)


@pytest.mark.quick
def test_a_report_is_read_by_name() -> None:
    good = Finding("one", 1.0, 1.0, 0.9, 1.1)
    bad = Finding("two", float("nan"), 1.0, -np.inf, 1.1, "why")
    report = CheckReport((good, bad), ("three: no",), 1e-4, 2.0)
    assert not report.passed
    assert report.failures == (bad,)
    assert report["one"] is good
    assert "FAILED two: nan (at most 1.1); why" in str(report)
    assert "not measured: three: no" in str(report)
    with pytest.raises(KeyError):
        report["four"]


@pytest.mark.full  # examples/private_check.py is nearly the same
def test_the_example_of_the_docstring() -> None:
    result = doctest.testmod(checking)
    assert result.attempted > 0
    assert result.failed == 0
