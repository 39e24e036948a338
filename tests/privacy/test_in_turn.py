"""DPFTRL: correlated noise, what it costs, and training on data that nothing samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting
import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.parameters import in_part
from tests.privacy.test_groups import classifier, loop, rows
from tfdist._keras import layers as keras_layers
from tfdist.data.datasets import DatasetBatches
from tfdist.errors import ArgumentError
from tfdist.privacy import Ledger, Phase
from tfdist.privacy.accounting.correlated import coefficients, sensitivity
from tfdist.privacy.dpftrl import SameOrder
from tfdist.privacy.mechanism.noise import Noise
from tfdist.privacy.validation import check_copies

L = keras.layers
SGD = keras.optimizers.SGD
CLIP = 0.5


def ftrl(noise: float = 1.0, **options: Any) -> tfdist.DPFTRL:
    return tfdist.DPFTRL(CLIP, noise_multiplier=noise, delta=1e-3, **options)


# --- what it costs ----------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("bands", [1, 2, 5, 16])
def test_sensitivity_is_that_of_the_matrix(bands: int) -> None:
    steps = 120
    inverse = sum(f * np.eye(steps, k=-lag) for lag, f in enumerate(coefficients(bands)))
    matrix = np.linalg.inv(inverse)
    # On this rests that all contributions of one sign, as often as may be, are the worst.
    assert (matrix[:, 0] > -1e-12).all()
    assert (np.diff(matrix[:, 0]) < 1e-12).all()
    for separation in (None, 7, 30, 50):
        worst = 0.0
        for first in range(separation or steps):
            columns = np.arange(first, steps, separation or steps)
            worst = max(worst, float(np.linalg.norm(matrix[:, columns].sum(1))))
        assert sensitivity(bands, separation, steps) == pytest.approx(worst)
    rng = np.random.default_rng(0)
    for _ in range(50):  # other steps, at least so far apart, and other directions
        columns = np.cumsum(rng.integers(30, 40, 10)) - 30
        directions = rng.normal(size=(10, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        kept = columns < steps
        moved = np.linalg.norm(matrix[:, columns[kept]] @ directions[kept])
        assert moved <= sensitivity(bands, 30, steps) + 1e-9


@pytest.mark.quick
def test_square_roots_series() -> None:
    series = coefficients(6)
    assert series[:4] == (1.0, -0.5, -0.125, -0.0625)
    assert np.convolve(series, series)[:6] == pytest.approx([1, -1, 0, 0, 0, 0])


@pytest.mark.quick
def test_epsilon_is_that_of_one_gaussian() -> None:
    phase = Phase(1.0, 8.0, 400, None, 1000, bands=8, separation=100)
    noise = 8.0 / sensitivity(8, 100, 400)
    expected = dp_accounting.get_epsilon_gaussian(noise, 1e-5)
    assert Ledger((phase,)).epsilon(1e-5, relation="replace_special") == pytest.approx(
        expected, rel=0.01
    )
    # Without correlation, an example's four steps are four Gaussians.
    alone = Ledger((Phase(1.0, 8.0, 400, bands=1, separation=100),))
    assert alone.epsilon(1e-5, relation="replace_special") == pytest.approx(
        dp_accounting.get_epsilon_gaussian(4.0, 1e-5), rel=0.01
    )
    twice = Ledger().add(phase).add(phase)
    assert len(twice.phases) == 2
    assert twice.epsilon(1e-5, relation="replace_special") == pytest.approx(
        dp_accounting.get_epsilon_gaussian(noise / math.sqrt(2), 1e-5), rel=0.01
    )
    assert Ledger.from_dict(twice.to_dict()) == twice
    for wrong in ({"sampling_probability": 0.5}, {"bands": 0}, {"separation": 0}):
        given = {"sampling_probability": 1.0, "noise_multiplier": 1.0, "steps": 1, "bands": 2}
        with pytest.raises(ArgumentError):
            Phase(**(given | wrong))


# --- the noise --------------------------------------------------------------------------


def moves(steps: int, privacy: Any, **options: Any) -> Any:
    """What steps add to 2000 weights whose gradient is 0, in units of the clipping norm."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((40,)), L.Dense(50, use_bias=False)])
    model.compile(SGD(1.0), "mse")
    model.set_weights([np.zeros((40, 50))])
    x, y = np.zeros((20, 40), "float32"), np.zeros((20, 50), "float32")
    kept = [model.get_weights()[0]]
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: kept.append(model.get_weights()[0])
    )
    given = {"batch_size": 5, "epochs": steps // 4, "verbose": 0, "callbacks": [keep]}
    tfdist.fit(model, x, y, privacy=privacy, **{**given, **options})
    return -5 * np.diff(np.array(kept), axis=0).reshape(steps, -1) / CLIP


def test_noise_is_taken_back_as_the_factors_say() -> None:
    factors = np.array(coefficients(3))
    received = moves(8, ftrl(1.5, bands=3, seed=6))
    noise = Noise(0, 1)
    noise.go_on([(0, 6)])
    own = [1.5 * noise.normal(2000, 0, step).numpy() for step in range(8)]
    for step in range(8):
        expected = sum(f * own[step - lag] for lag, f in enumerate(factors) if lag <= step)
        # Rounded to a grid of 2^-6 deviations.
        np.testing.assert_allclose(received[step], expected, atol=1.5 / 128 + 1e-4)


def test_covariances_of_secret_noise_are_right() -> None:
    received = moves(24, ftrl(1.5, bands=4))
    factors = np.array(coefficients(4))
    settled = received[3:]  # before, there is less to take back
    for lag in range(6):
        expected = 1.5**2 * (factors[lag:] * factors[: max(0, 4 - lag)]).sum()
        products = settled[lag:] * settled[: len(settled) - lag]
        # Of some 36000 products of variance 5, not quite independent: 5 deviations are 0.1.
        assert products.mean() == pytest.approx(expected, abs=0.1)
    # The sum of all noise is less than a fifth of what independent noise would be.
    total = received.sum(0).std() / (1.5 * math.sqrt(24))
    assert total < 0.45
    assert moves(24, ftrl(1.5, bands=1)).sum(0).std() / (1.5 * math.sqrt(24)) > 0.9
    assert abs(np.corrcoef(received[0], moves(4, ftrl(1.5, bands=4))[0])[0, 1]) < 0.12


def test_each_fit_begins_anew_and_the_optimizer_is_told() -> None:
    model = classifier(optimizer=tfdist.privacy.DPAdam(0.01))
    x, y, _ = rows()
    told = []
    ask = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: told.append(model.optimizer.noise_deviation())
    )
    options = {"batch_size": 20, "verbose": 0, "callbacks": [ask]}
    for _ in range(2):
        report = tfdist.fit(model, x, y, privacy=ftrl(bands=2), **options).privacy
    assert [phase.steps for phase in report.ledger.phases] == [3, 3]
    assert told == pytest.approx([math.sqrt(1.25) * CLIP / 20] * 2, rel=1e-4)


# --- training ---------------------------------------------------------------------------


def by_hand(model: Any, x: Any, y: Any, batches: Any) -> None:
    for batch in batches:
        variables = model.trainable_variables
        with keras_layers.without_regularizers(variables):
            sums, _ = loop(model, x, y, CLIP, [[row] for row in batch])
        for variable, summed in zip(variables, sums, strict=True):
            penalty = 2 * 0.01 * variable.numpy() if variable.regularizer else 0.0
            variable.assign(variable.numpy() - 0.5 * (summed / 16 + penalty))


@pytest.mark.parametrize(
    "kind", in_part(["arrays", "in_order", "dataset", "py_dataset"], full=["in_order"])
)
def test_every_example_takes_part_in_its_turn(kind: str) -> None:
    x, y, _ = rows()
    order = SameOrder(kind == "arrays")
    batches = order.batches(0, 8, num_rows=60, batch_size=16, seed=3)
    assert all((a == b).all() for a, b in zip(batches[:4], batches[4:], strict=True))
    assert sorted(np.concatenate(batches[:4])) == list(range(60))
    expected = classifier()
    start = expected.get_weights()
    by_hand(expected, x, y, batches)
    model = classifier()
    model.set_weights(start)

    class Pages(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, page: int) -> tuple[Any, Any]:
            return x[page * 16 : page * 16 + 16], y[page * 16 : page * 16 + 16]

    options: dict[str, Any] = {"epochs": 2, "verbose": 0, "seed": 3}
    given: tuple[Any, ...] = (x, y)
    if kind == "dataset":
        given = (tf.data.Dataset.from_tensor_slices((x, y)).batch(16),)
    elif kind == "py_dataset":
        given = (Pages(),)
    else:
        options["batch_size"] = 16
    if kind != "arrays":
        options["shuffle"] = False
    separation = {} if len(given) == 2 else {"min_separation": 4}
    report = tfdist.fit(model, *given, privacy=ftrl(0.0, **separation), **options).privacy
    for received, wanted in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(received, wanted, rtol=2e-4, atol=1e-6)
    (phase,) = report.ledger.phases
    assert (phase.steps, phase.separation, phase.bands) == (8, 4, 8)
    assert report.secret  # the order may be known


def test_batches_hold_the_copies_that_are_clipped_as_one() -> None:
    x, y, _ = rows(24)
    augment = tfdist.Augment([L.GaussianNoise(0.5, seed=1)])
    models, data = [], tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    for given, options in (((x, y), {"batch_size": 8, "shuffle": False}), ((data,), {})):
        models.append(classifier(L.Dense(3, kernel_initializer="zeros")))
        privacy = ftrl(0.0, augmentations=3)
        options = {"verbose": 0, "seed": 3, "augment": augment, **options}
        tfdist.fit(models[-1], *given, privacy=privacy, **options)
    for arrays, batches in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(batches, arrays, rtol=1e-5, atol=1e-6)
    with pytest.raises(ArgumentError, match="augmentations=3 and data with 1"):
        check_copies(ftrl(augmentations=3), augment, DatasetBatches(data, None))


def test_a_target_is_kept_to_and_said() -> None:
    x, y, _ = rows()
    privacy = tfdist.DPFTRL(CLIP, target_epsilon=2.0, delta=1e-3, bands=4)
    model = classifier()
    report = tfdist.fit(
        model, x, y, batch_size=16, epochs=3, verbose=0, privacy=privacy
    ).privacy
    assert 1.97 < report.epsilon <= 2.0
    text = report.statement()
    for part in (
        "12 steps of DP-FTRL",
        "at least 4 apart",
        "the 3 steps after it take a part back",
        "replaced by one that contributes nothing",
        "It assumes that noise was made from",
    ):
        assert part in text
    assert "drawn" not in text
    budget = tfdist.PrivacyBudget(3.0)
    options = {"batch_size": 16, "epochs": 30, "verbose": 0, "callbacks": [budget]}
    more = tfdist.fit(model, x, y, privacy=ftrl(4.0, bands=4), **options)
    assert more.privacy.epsilon <= more.history["epsilon"][-1] * (1 + 1e-6) <= 3.0
    assert 4 <= more.privacy.ledger.phases[1].steps < 120


class BrokenOffError(Exception):
    pass


@pytest.mark.parametrize("seed", in_part([4, None], full=[4]))
def test_noise_goes_on_after_an_interruption(tmp_path: Path, seed: int | None) -> None:
    """With a seed to the same bits; with a secret, what is taken back is what was given."""
    keras.utils.set_random_seed(1)

    def train(folder: Path, stop: int | None) -> tuple[Any, Any]:
        model = keras.Sequential([keras.Input((40,)), L.Dense(50, use_bias=False)])
        model.compile(SGD(1.0), "mse")
        model.set_weights([np.zeros((40, 50))])
        x, y = np.zeros((20, 40), "float32"), np.zeros((20, 50), "float32")

        def breaks(batch: int, logs: Any) -> None:
            if stop is not None and int(model.optimizer.iterations.numpy()) == stop:
                raise BrokenOffError

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=breaks)
        options = {"batch_size": 5, "epochs": 16, "verbose": 0, "callbacks": [callback]}
        checkpoint = tfdist.Checkpoint(folder, every=1)
        privacy = ftrl(1.5, bands=8, seed=seed)
        report = tfdist.fit(model, x, y, privacy=privacy, checkpoint=checkpoint, **options)
        return model.get_weights()[0], report.privacy

    with pytest.raises(BrokenOffError):
        train(tmp_path / "a", 31)
    resumed, report = train(tmp_path / "a", None)
    *lost, whole = report.ledger.mechanisms
    assert whole == Phase(1.0, 1.5, 64, None, 20, bands=8, separation=4)
    if seed is None:  # of the first process, what the second made again with other noise
        assert [phase.after + phase.steps for phase in lost] == [31]
    else:
        assert not lost
        np.testing.assert_array_equal(resumed, train(tmp_path / "b", None)[0])
    # Of what the sum of all steps' noise is: the last steps' own, and little of all others.
    left = sum(np.cumsum(coefficients(8))[min(n, 7)] ** 2 for n in range(64))
    assert (5 * resumed / CLIP).std() == pytest.approx(1.5 * math.sqrt(left), rel=0.08)


def test_a_callback_must_not_move_the_noise(tmp_path: Path) -> None:
    x, y, _ = rows()
    model = classifier()
    back = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.optimizer.iterations.assign(0)
    )
    options = {"batch_size": 16, "epochs": 2, "verbose": 0}
    with pytest.raises(ArgumentError, match="No callback may set the optimizer's `iterations`"):
        tfdist.fit(model, x, y, privacy=ftrl(), callbacks=[back], **options)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relation": "add_or_remove_one"}, "would move all others"),
        ({"group_ids": [1, 2]}, "`group_ids` must be None with DPFTRL"),
        ({"target_quantile": 0.5}, "`target_quantile` must be None with DPFTRL"),
        ({"bands": 0}, "`bands` must be a whole number"),
        ({"min_separation": 0}, "`min_separation` must be a whole number"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ftrl(**settings)


@pytest.mark.quick
def test_data_that_cannot_be_accounted_for() -> None:
    x, y, _ = rows()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(20)
    pages = (batch for batch in dataset)
    for given, settings, options, message in (
        ((x, y), {}, {"sampler": tfdist.samplers.Uniform()}, "`sampler` must be None"),
        ((x, y), {"min_separation": 2}, {}, "`min_separation` must be None for arrays"),
        ((dataset,), {}, {"epochs": 2}, "`min_separation` must be given"),
        ((pages,), {}, {}, "`x` must be arrays, a tf.data.Dataset or"),
        ((dataset.filter(lambda *_: True),), {}, {}, "Pass steps_per_epoch"),
        (
            (dataset.filter(lambda *_: True),),
            {"min_separation": 3},
            {"steps_per_epoch": 3},
            "whatever the others hold, .* `sample_weight` of 0",
        ),
        ((dataset.concatenate(dataset),), {}, {}, "one source in several places"),
    ):
        with pytest.raises(ArgumentError, match=message):
            tfdist.fit(classifier(), *given, verbose=0, privacy=ftrl(**settings), **options)


@pytest.mark.quick
def test_noise_that_goes_on_is_refused_where_processes_come_and_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(tfdist.init().strategy), "elastic", True)
    with pytest.raises(ArgumentError, match="must run on a fixed set of processes"):
        tfdist.fit(classifier(), *rows()[:2], verbose=0, privacy=ftrl())
