"""DP-SGD in `fit`: what is computed, how much noise there is, what is counted and refused."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.parameters import in_part
from tfdist.errors import ArgumentError
from tfdist.privacy import Ledger, Phase, Poisson
from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.mechanism.noise import Noise
from tfdist.privacy.mechanism.normals import standard_normal

L = keras.layers
SGD = keras.optimizers.SGD
CLIP = 0.5


def rows(count: int = 60, columns: int = 6) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, columns)).astype("float32"), rng.integers(0, 3, size=count)


def crossentropy(**options: Any) -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def classifier(*layers: Any, loss: Any = None, optimizer: Any = "sgd", **options: Any) -> Any:
    keras.utils.set_random_seed(1)
    made = layers or (L.Dense(8, activation="relu", kernel_regularizer="l2"), L.Dense(3))
    model = keras.Sequential([keras.Input((6,)), *made])
    model.compile(optimizer, loss or crossentropy(), metrics=["accuracy"], **options)
    return model


def noiseless(**options: Any) -> tfdist.DPSGD:
    return tfdist.DPSGD(CLIP, noise_multiplier=0.0, delta=1e-3, **options)


@functools.cache
def by_hand(per_layer: bool, quantile: float | None) -> tuple[list[Any], float]:
    """DP-SGD without noise, one example after the other, by plain gradient descent.

    Returns:
        The weights after 16 steps, and the norm that was clipped to in the end.
    """
    x, y = rows()
    model, batch_size, rate = classifier(), 8, 0.5
    layers = [layer.trainable_variables for layer in model.layers if layer.trainable_variables]
    parts = [len(variables) for variables in layers] if per_layer else [sum(map(len, layers))]
    clip = CLIP
    sampler = Poisson(capacity=len(x))
    for step in range(16):
        drawn = sampler.rows(step, num_rows=len(x), batch_size=batch_size, seed=3)
        variables = model.trainable_variables
        total = [np.zeros(v.shape) for v in variables]
        votes = 0.0
        for row in drawn:
            with tf.GradientTape() as tape:
                outputs = model(x[row : row + 1], training=True)
                loss = model.loss(y[row : row + 1], outputs)
            gradients = [g.numpy() for g in tape.gradient(loss, variables)]
            squares = np.array([float((g.astype("float64") ** 2).sum()) for g in gradients])
            norms = [math.sqrt(part.sum()) for part in np.split(squares, np.cumsum(parts)[:-1])]
            bound = clip / math.sqrt(len(parts))
            factors = np.repeat([min(1.0, bound / norm) for norm in norms], parts)
            votes += 0.5 if norms[0] <= clip else -0.5
            total = [t + g * f for t, g, f in zip(total, gradients, factors, strict=True)]
        for variable, summed in zip(variables, total, strict=True):
            penalty = 2 * 0.01 * variable.numpy() if variable.regularizer else 0.0
            variable.assign(variable.numpy() - rate * (summed / batch_size + penalty))
        if quantile is not None:
            clip *= math.exp(-0.2 * (votes / batch_size + 0.5 - quantile))
    return model.get_weights(), clip


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "microbatches": ({}, {"microbatch_size": 3}),
    "several_steps_at_once": ({"steps_per_execution": 4}, {}),
    "compiled": ({"jit_compile": True}, {}),
    "per_layer": ({}, {"clipping": "per_layer"}),
    "adaptive": ({}, {"target_quantile": 0.7}),
    "adaptive_microbatches": ({}, {"target_quantile": 0.7, "microbatch_size": 3}),
    "adaptive_compiled": ({"jit_compile": True}, {"target_quantile": 0.7}),
    "per_layer_microbatches": ({}, {"clipping": "per_layer", "microbatch_size": 3}),
    "compiled_microbatches": ({"jit_compile": True}, {"microbatch_size": 4}),
}


ALONE_TOO = (
    "adaptive_microbatches",
    "adaptive_compiled",
    "per_layer_microbatches",
    "compiled_microbatches",
)


@pytest.mark.parametrize("way", in_part(WAYS, full=ALONE_TOO))
def test_fit_does_what_the_algorithm_says(way: str) -> None:
    compiled, settings = WAYS[way]
    x, y = rows()
    quantile = settings.get("target_quantile")
    expected, clip = by_hand(settings.get("clipping") == "per_layer", quantile)
    scale = 1024.0 if "compiled" in way else None  # changes nothing
    optimizer = keras.optimizers.SGD(0.5, loss_scale_factor=scale)
    model = classifier(optimizer=optimizer, **compiled)
    options = {"batch_size": 8, "epochs": 2, "verbose": 0, "seed": 3}
    history = tfdist.fit(model, x, y, privacy=noiseless(**settings), **options).history
    for received, wanted in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(received, wanted, rtol=2e-4, atol=1e-6)
    if quantile is not None:  # shown is the norm of the last step, whose update came after
        assert history["l2_norm_clip"][-1] == pytest.approx(clip, rel=0.2)


def test_a_loss_of_ones_own_is_taken_of_single_examples() -> None:
    x, y = rows()

    def own(y_true: Any, y_pred: Any) -> Any:
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    class Whole(keras.losses.Loss):
        """Gives one number for all examples."""

        def call(self, y_true: Any, y_pred: Any) -> Any:
            return keras.ops.mean(own(y_true, y_pred))

    weights = []
    for loss in (crossentropy(), own, Whole(), crossentropy(ignore_class=7)):
        model = classifier(loss=loss)
        tfdist.fit(model, x, y, batch_size=8, verbose=0, seed=3, privacy=noiseless())
        weights.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    for other in weights[1:]:
        np.testing.assert_allclose(other, weights[0], rtol=1e-4, atol=1e-6)


def test_weights_are_of_the_loss_and_so_before_clipping() -> None:
    x, y = rows()
    models: list[Any] = []
    for weight in (np.ones(len(x)), np.full(len(x), 1e6)):
        model = classifier(L.Dense(3, kernel_initializer="ones"))
        options = {"batch_size": 8, "verbose": 0, "seed": 3}
        privacy = tfdist.DPSGD(1e-3, noise_multiplier=0.0, delta=1e-3)
        tfdist.fit(model, x, y, sample_weight=weight, privacy=privacy, **options)
        models.append(model)
    for a, b in zip(*(m.get_weights() for m in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # all were clipped


# --- noise ------------------------------------------------------------------------------


def noise_of_steps(steps: int, multiplier: float, clip: float) -> Any:
    """What steps add to 2000 weights whose gradient is 0, in units of the learning rate."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((40,)), L.Dense(50, use_bias=False)])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x, y = np.zeros((20, 40), "float32"), np.zeros((20, 50), "float32")
    kept = [model.get_weights()[0]]
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: kept.append(model.get_weights()[0])
    )
    privacy = tfdist.DPSGD(clip, noise_multiplier=multiplier, delta=1e-3)
    options = {"batch_size": 5, "epochs": steps // 4, "verbose": 0, "callbacks": [keep]}
    tfdist.fit(model, x, y, privacy=privacy, **options)
    return 5 * np.diff(np.array(kept), axis=0).reshape(steps, -1)


def test_noise_has_the_right_deviation_and_is_new_in_each_step_and_fit() -> None:
    first, second = noise_of_steps(8, 1.5, 0.7), noise_of_steps(8, 1.5, 0.7)
    numbers = np.concatenate([first, second])
    # Of 32000 numbers: 5 deviations of the estimate are 2 %.
    assert numbers.std() == pytest.approx(1.5 * 0.7, rel=0.02)
    assert abs(numbers.mean()) < 5 * 1.05 / math.sqrt(numbers.size)
    correlation = np.corrcoef(numbers)[np.triu_indices(len(numbers), 1)]
    assert np.abs(correlation).max() < 5.5 / math.sqrt(numbers.shape[1])


def test_noise_is_new_when_a_callback_sets_the_optimizer_back() -> None:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((40,)), L.Dense(50, use_bias=False)])
    model.compile(SGD(1.0), "mse")
    x, y = np.zeros((20, 40), "float32"), np.zeros((20, 50), "float32")
    weights = [model.get_weights()[0]]

    def set_back(epoch: int, logs: Any) -> None:
        weights.append(model.get_weights()[0])
        model.optimizer.iterations.assign(0)

    back = keras.callbacks.LambdaCallback(on_epoch_end=set_back)
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)
    options = {"batch_size": 20, "epochs": 2, "verbose": 0, "callbacks": [back]}
    tfdist.fit(model, x, y, privacy=privacy, **options)
    first, second = (move.ravel() for move in np.diff(np.array(weights), axis=0))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(2000)


@pytest.mark.quick
def test_normal_numbers_are_normal() -> None:
    from scipy import stats

    key, counter = tf.constant([12345], tf.uint64), tf.constant([0, 7], tf.uint64)
    numbers = standard_normal(1_000_001, key, counter).numpy().astype("float64")
    assert len(numbers) == 1_000_001
    assert np.isfinite(numbers).all()
    assert stats.kstest(numbers, "norm").pvalue > 1e-6
    assert abs(stats.kurtosis(numbers)) < 6 * math.sqrt(24 / len(numbers))
    beyond = (np.abs(numbers) > 4).sum()  # 63 are expected
    assert 25 < beyond < 115
    assert np.array_equal(numbers[:10], standard_normal(1_000_001, key, counter)[:10])


@pytest.mark.quick
def test_streams_differ_between_replicas_and_are_renewed() -> None:
    noise = Noise(first_replica=4, local_replicas=2)
    drawn = []
    for _ in range(2):
        noise.renew(None)
        drawn += [noise.normal(1000, r, s).numpy() for r in (4, 5) for s in (0, 1)]
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(8, 1)]).max() < 6 / math.sqrt(1000)
    noise.renew(9)
    known = noise.normal(10, 5, 3).numpy()
    other = Noise(first_replica=5, local_replicas=1)
    other.renew(9)
    np.testing.assert_array_equal(other.normal(10, 5, 3), known)


# --- accounting -------------------------------------------------------------------------


def private_fit(model: Any, *, epochs: int = 1, count: int = 60, **options: Any) -> Any:
    x, y = rows(count)
    given = {"privacy": tfdist.DPSGD(CLIP, noise_multiplier=2.0, delta=1e-3), **options}
    return tfdist.fit(model, x, y, batch_size=6, epochs=epochs, verbose=0, **given)


def test_several_fits_compose() -> None:
    model = classifier(L.Dense(3))
    first = private_fit(model).privacy
    assert first.ledger == Ledger((Phase(0.1, 2.0, 10, None, 60),))
    assert first.secret
    more_noise = tfdist.DPSGD(CLIP, noise_multiplier=3.0, delta=1e-3)
    second = private_fit(model, epochs=2, privacy=more_noise).privacy
    assert [phase.steps for phase in second.ledger.phases] == [10, 20]
    assert second.epsilon > first.epsilon
    elsewhere = tfdist.DPSGD(CLIP, noise_multiplier=2.0, delta=1e-3, spent=second.ledger)
    third = private_fit(classifier(L.Dense(3)), privacy=elsewhere).privacy
    assert third.ledger.steps == 40
    assert third.uncounted_steps == 0


def test_a_target_is_kept_to_with_what_was_spent() -> None:
    model = classifier(L.Dense(3))
    model.steps_per_execution = 5
    target = tfdist.DPSGD(CLIP, target_epsilon=1.0, delta=1e-3)
    report = private_fit(model, epochs=2, privacy=target, steps_per_epoch=7).privacy
    assert report.ledger.steps == 20  # Keras makes whole executions
    assert 0.99 < report.epsilon <= 1.0
    with pytest.raises(ArgumentError, match="must be above the epsilon of the steps before"):
        private_fit(model, privacy=tfdist.DPSGD(CLIP, target_epsilon=0.9, delta=1e-3))


def test_a_broken_training_counts_too() -> None:
    model = classifier()

    def breaks(batch: int, logs: Any) -> None:
        if batch == 3:
            raise KeyboardInterrupt

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=breaks)
    with pytest.raises(KeyboardInterrupt):
        private_fit(model, callbacks=[callback])
    assert private_fit(model).privacy.ledger.steps == 14


def test_restored_steps_count(tmp_path: Any) -> None:
    def backup() -> Any:
        return keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=4)

    class Breaks(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self.model.optimizer.iterations.numpy() == 18:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        private_fit(classifier(), epochs=3, callbacks=[backup(), Breaks()])
    again = classifier()
    report = private_fit(again, epochs=3, callbacks=[backup()]).privacy
    # Two were made after the backup, and are in no weights; they were made all the same.
    assert report.ledger.steps == int(again.optimizer.iterations.numpy()) + 2
    assert report.ledger.steps >= 30
    assert report.uncounted_steps == 0


def test_a_given_seed_is_reported_and_repeats() -> None:
    weights = []
    for _ in range(2):
        model = classifier(L.Dense(3, kernel_initializer="zeros"))
        seeded = tfdist.DPSGD(CLIP, noise_multiplier=1.0, delta=1e-3, seed=4)
        report = private_fit(model, privacy=seeded).privacy
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not report.secret
    assert report.statement().startswith("There is no guarantee")
    assert "no guarantee" in report.line()
    # Nothing that follows can mend it.
    assert not private_fit(model).privacy.secret
    assert not private_fit(classifier(L.Dense(3)), seed=3).privacy.secret


def test_updates_made_before_are_named() -> None:
    model = classifier()
    tfdist.fit(model, *rows(), batch_size=6, verbose=0)
    report = private_fit(model).privacy
    assert report.uncounted_steps == 10
    assert "10 updates before" in report.statement()


def test_updates_of_a_model_within_a_model_are_named() -> None:
    """As in transfer learning, or of a teacher: its weights may be of the same data."""
    teacher = classifier()
    teacher.fit(*rows(), batch_size=6, verbose=0)
    teacher.trainable = False
    inputs = keras.Input((6,))
    model = keras.Model(inputs, L.Dense(3)(teacher(inputs)))
    model.compile("sgd", crossentropy())
    assert private_fit(model).privacy.uncounted_steps == 10
    assert private_fit(model).privacy.uncounted_steps == 10  # and not once more


def test_one_line_at_the_end(capsys: Any) -> None:
    x, y = rows()
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=2.0, delta=1e-3)
    tfdist.fit(classifier(), x, y, batch_size=6, verbose=2, privacy=privacy)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("tfdist: epsilon 0.")
    assert last.endswith("at delta 0.001 spent in 10 steps")


def test_a_careless_guarantee_is_said(capsys: Any) -> None:
    x, y = rows()
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=0.3, delta=0.1)
    tfdist.fit(classifier(), x, y, batch_size=6, epochs=2, verbose=2, privacy=privacy)
    first, second, *_, last = capsys.readouterr().out.strip().splitlines()
    assert second.startswith(f"tfdist: delta is not below 1 / {len(x)}"), first
    assert last.endswith("; an epsilon above 10 promises little")


# --- the budget -------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", in_part([1, 4], full=[1]))
def test_the_budget_stops_before_it_is_exceeded(at_once: int) -> None:
    model = classifier(steps_per_execution=at_once)
    report = private_fit(model, epochs=9, callbacks=[tfdist.PrivacyBudget(0.8)]).privacy
    history = model.history.history["epsilon"]
    assert report.epsilon <= history[-1] * (1 + 1e-6) <= 0.8
    (phase,) = report.ledger.phases
    assert 10 < phase.steps < 90
    beyond = Ledger().add(Phase(0.1, 2.0, phase.steps + 2 * at_once, None, 60))
    assert beyond.epsilon(1e-3) > 0.8
    assert history == sorted(history)
    with pytest.raises(ArgumentError, match="`max_epsilon` must be large enough"):
        private_fit(model, callbacks=[tfdist.PrivacyBudget(0.8)])


@pytest.mark.parametrize(
    ("when", "most"),
    [pytest.param("on_train_begin", 5, marks=pytest.mark.full), ("on_epoch_end", 25)],
)
def test_the_budget_knows_of_weights_that_are_loaded(
    when: str, most: int, tmp_path: Path
) -> None:
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=2.0, delta=1e-3, accountant="rdp")
    path = str(tmp_path / "w.weights.h5")
    spent = private_fit(saved := classifier(), epochs=3).privacy.ledger
    saved.save_weights(path)
    model = classifier()
    load = keras.callbacks.LambdaCallback(**{when: lambda *_: model.load_weights(path)})
    limit = spent.add(Phase(0.1, 2.0, most, None, 60)).epsilon(1e-3, accountant="rdp")
    callbacks = [tfdist.PrivacyBudget(limit), load]
    report = private_fit(model, epochs=4, privacy=privacy, callbacks=callbacks).privacy
    assert report.ledger.steps == spent.steps + most


def test_the_budget_only_shows_without_a_limit() -> None:
    model = classifier()
    private_fit(model, epochs=2, callbacks=[tfdist.PrivacyBudget()])
    assert len(model.history.history["epsilon"]) == 2


def test_the_budget_needs_privacy() -> None:
    with pytest.raises(ArgumentError, match="must be used in private training"):
        private_fit(classifier(), privacy=None, callbacks=[tfdist.PrivacyBudget(1.0)])


# --- refusals ---------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_multiplier": 1.0}, "`delta` must be given"),
        ({"delta": 1e-3}, "Exactly one of `noise_multiplier` and `target_epsilon`"),
        ({"noise_multiplier": 1.0, "target_epsilon": 1.0, "delta": 1e-3}, "Exactly one of"),
        ({"noise_multiplier": -1.0, "delta": 1e-3}, "`noise_multiplier` must be a number"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, "`delta` must be a number"),
        ({"noise_multiplier": 1.0, "delta": 1e-3, "microbatch_size": 0}, "`microbatch_size`"),
        ({"noise_multiplier": 1.0, "delta": 1e-3, "accountant": "x"}, "`accountant` must be"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        tfdist.DPSGD(1.0, **settings)


@pytest.mark.quick
def test_a_norm_above_nothing() -> None:
    with pytest.raises(ArgumentError, match="`l2_norm_clip` must be"):
        tfdist.DPSGD(0.0, noise_multiplier=1.0, delta=1e-3)


class MeanOfBatch(L.Layer):  # type: ignore[misc]
    def call(self, inputs: Any) -> Any:
        return inputs - keras.ops.mean(inputs, 0, keepdims=True)


class Remembers(L.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.seen = self.add_weight(shape=(), trainable=False)

    def call(self, inputs: Any) -> Any:
        self.seen.assign(self.seen + keras.ops.mean(inputs))
        return inputs


class Adds(L.Layer):  # type: ignore[misc]
    def call(self, inputs: Any) -> Any:
        self.add_loss(keras.ops.mean(inputs**2))
        return inputs


def in_float8() -> Any:
    model = classifier(L.Dense(4), L.Dense(3))
    model.layers[0].quantize("float8")
    return model


class Turns(L.Layer):  # type: ignore[misc]
    """Its gradients have imaginary parts, which no norm in float32 would have."""

    def build(self, shape: Any) -> None:
        self.turn = self.add_weight(shape=(), dtype="complex64", initializer="ones")

    def call(self, inputs: Any) -> Any:
        turned = self.turn * tf.complex(inputs, 100 * inputs)
        return tf.math.real(turned) + tf.math.imag(turned)


class OwnStep(keras.Sequential):  # type: ignore[misc]
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


def own_step() -> Any:
    model = OwnStep([keras.Input((6,)), L.Dense(3)])
    model.compile("sgd", crossentropy())
    return model


def step_of_the_instance() -> Any:
    model = classifier(L.Dense(3))
    model.train_step = lambda data: {}
    return model


REFUSED = {
    "batch_norm": (
        lambda: classifier(L.BatchNormalization(), L.Dense(3)),
        "make_private_model",
    ),
    "mixing": (lambda: classifier(L.Dense(4), MeanOfBatch(), L.Dense(3)), "may mix"),
    "state": (lambda: classifier(Remembers(), L.Dense(3)), "keep no state"),
    "add_loss": (lambda: classifier(L.Dense(4), Adds(), L.Dense(3)), "`add_loss`"),
    "activity": (
        lambda: classifier(L.Dense(4, activity_regularizer="l2"), L.Dense(3)),
        "must not have an `activity_regularizer`",
    ),
    "float8": (in_float8, "float8"),
    "complex": (lambda: classifier(Turns(), L.Dense(3)), "must be real numbers"),
    "own_step": (own_step, "`train_step` of its own"),
    "step_of_the_instance": (step_of_the_instance, "`train_step` of its own"),
    "circle": (lambda: classifier(L.Dense(3), loss=keras.losses.Circle()), "Circle"),
    "clipping": (lambda: classifier(optimizer=SGD(0.1, clipnorm=1.0)), "clipnorm=1.0"),
    "accumulation": (
        lambda: classifier(optimizer=SGD(0.1, gradient_accumulation_steps=2)),
        "microbatch_size",
    ),
    "loss_scale": (
        lambda: classifier(optimizer=keras.optimizers.LossScaleOptimizer(SGD(0.1))),
        "mixed_bfloat16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_private_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    before = model.get_weights()
    with pytest.raises(ArgumentError, match=message):
        private_fit(model)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


class FirstRows(Poisson):
    """Is taken for Poisson sampling, and always draws the same rows."""

    def rows(self, *args: Any, **options: Any) -> Any:
        return np.arange(6)


def test_steps_without_a_graph_are_refused() -> None:
    """Python code that runs in each step may remember examples."""
    with pytest.raises(ArgumentError, match=r"must be traced.*run_eagerly=True"):
        private_fit(classifier(run_eagerly=True))
    tf.config.run_functions_eagerly(True)
    try:
        with pytest.raises(ArgumentError, match=r"must be traced.*run_functions_eagerly"):
            private_fit(classifier())
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": tfdist.samplers.Uniform()}, "pass tfdist.privacy.PoissonLike"),
        ({"sampler": FirstRows()}, "of type FirstRows"),
        ({"class_weight": "balanced"}, "`class_weight` must be a dict"),
        ({"privacy": 1.0}, "`privacy` must be a tfdist.DPSGD"),
    ],
)
def test_arguments_that_cannot_be_private(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        private_fit(classifier(), **options)


class Keeps(keras.metrics.Metric):  # type: ignore[misc]
    """Keeps the last prediction."""

    def __init__(self) -> None:
        super().__init__(name="keeps")
        self.last = self.add_variable(shape=(), initializer="zeros", name="last")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.last.assign(y_pred[-1, 0])

    def result(self) -> Any:
        return self.last


def test_metrics_that_keep_single_examples_are_refused() -> None:
    model = classifier()
    model.compile("sgd", crossentropy(), metrics=["accuracy", Keeps()])
    with pytest.raises(ArgumentError, match="Received: 'keeps', whose state depends on"):
        private_fit(model)
    binary = keras.Sequential([keras.Input((6,)), L.Dense(1, activation="sigmoid")])
    summing = [
        keras.metrics.AUC(name="auc"),
        keras.metrics.Precision(),
        keras.metrics.R2Score(),
        "mae",
    ]
    binary.compile("sgd", "binary_crossentropy", metrics=summing, weighted_metrics=["accuracy"])
    x, y = rows()
    y = (y[:, None] > 1).astype("float32")
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=1.0, delta=1e-3)
    fitted = tfdist.fit(binary, x, y, batch_size=6, verbose=0, privacy=privacy)
    assert 0 < fitted.history["auc"][0] < 1


CALLBACKS: dict[str, tuple[Any, Any, str]] = {
    "stopping": (
        lambda **m: keras.callbacks.EarlyStopping(**m),
        {"monitor": "val_loss"},
        "EarlyStopping with monitor='loss'",
    ),
    "plateau": (
        lambda **m: keras.callbacks.ReduceLROnPlateau(**m),
        {"monitor": "l2_norm_clip", "mode": "min"},
        "ReduceLROnPlateau with monitor='loss'",
    ),
    "best": (
        lambda monitor="loss", best=True: keras.callbacks.ModelCheckpoint(
            "best.keras", monitor, save_best_only=best
        ),
        {"best": False},
        "monitor='val_loss' with validation_data",
    ),
    "file name": (
        lambda by="loss:.6f": keras.callbacks.ModelCheckpoint(
            f"{{epoch}}-{{{by}}}.weights.h5", save_weights_only=True
        ),
        {"by": "val_loss"},
        "such as {val_loss} with validation_data",
    ),
    "batches": (
        lambda update_freq=1: keras.callbacks.TensorBoard("logs", update_freq=update_freq),
        {"update_freq": "epoch"},
        "update_freq=1. Use update_freq='epoch'",
    ),
    "classes": (
        lambda rows=slice(0, 40): tfdist.PerClassMetrics(DATA[0][rows], DATA[1][rows]),
        {"rows": slice(40, 60)},
        "data that need not be protected",
    ),
}
DATA = rows()


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_that_let_examples_out_are_refused(
    name: str, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make, allowed, message = CALLBACKS[name]
    bad = {} if name in ("best", "file name", "batches", "classes") else {"monitor": "loss"}
    x, y = DATA[0][:40], DATA[1][:40]
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=1.0, delta=1e-3)
    options = {"batch_size": 20, "verbose": 0, "validation_data": (DATA[0][40:], DATA[1][40:])}
    model = classifier()
    with pytest.raises(ArgumentError, match=message):
        tfdist.fit(model, x, y, privacy=privacy, callbacks=[make(**bad)], **options)
    assert not list(tmp_path.iterdir())
    tfdist.fit(model, x, y, privacy=privacy, callbacks=[make(**allowed)], **options)


@pytest.mark.quick
def test_a_loss_that_is_not_finite_ends_nothing() -> None:
    with pytest.raises(ArgumentError, match="Leave it out: examples whose gradient"):
        private_fit(classifier(), callbacks=keras.callbacks.TerminateOnNaN())


def test_streams_of_batches_are_refused() -> None:
    dataset = tf.data.Dataset.from_tensor_slices(rows()).batch(6)
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(ArgumentError, match="`x` must be arrays in private training"):
        tfdist.fit(classifier(), dataset, verbose=0, privacy=privacy)


def test_make_private_model_replaces_batch_normalization() -> None:
    keras.utils.set_random_seed(1)
    begun = keras.Input((6, 6, 8))
    most_inner = keras.Model(begun, L.BatchNormalization(name="inner")(L.Conv2D(12, 3)(begun)))
    block = keras.Sequential([keras.Input((6, 6, 8)), most_inner])
    inputs = keras.Input((6, 6, 3))
    made = L.BatchNormalization(name="outer", scale=False)(L.Conv2D(8, 1)(inputs))
    outputs = L.Dense(3)(L.GlobalAveragePooling2D()(block(made)))
    model = keras.Model(inputs, outputs)
    model.compile(SGD(0.25), crossentropy())
    private, changed = tfdist.privacy.make_private_model(model)
    assert changed == [
        "outer: BatchNormalization became GroupNormalization(groups=2)",
        "inner: BatchNormalization became GroupNormalization(groups=3)",
    ]
    kinds = [type(layer).__name__ for layer in private._flatten_layers()]
    assert "BatchNormalization" not in kinds
    assert kinds.count("GroupNormalization") == 2
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    same = [v for v in private.trainable_variables if v.name == "kernel"]
    for a, b in zip(kernels, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(private.optimizer.learning_rate) == 0.25
    x = np.random.default_rng(0).normal(size=(20, 6, 6, 3)).astype("float32")
    privacy = tfdist.DPSGD(CLIP, noise_multiplier=1.0, delta=1e-3)
    y = np.arange(20) % 3
    tfdist.fit(private, x, y, batch_size=5, verbose=0, privacy=privacy)
    with pytest.raises(ArgumentError, match="must be a Sequential or functional model"):
        tfdist.privacy.make_private_model(OwnStep([keras.Input((6,)), L.Dense(3)]).layers[0])


def test_what_is_slow_is_named_once(capsys):
    x, y = rows()
    model = classifier(L.Dense(4), L.PReLU(name="slopes"), L.Dense(3))
    for _ in range(2):
        tfdist.fit(model, x, y, batch_size=30, verbose=2, privacy=noiseless(seed=1))
    printed = capsys.readouterr().out
    assert printed.count("exact but slow: slopes (PReLU)\n") == 1
    tfdist.fit(classifier(), x, y, batch_size=30, verbose=2, privacy=noiseless(seed=1))
    assert "slow" not in capsys.readouterr().out


def test_an_adaptive_norm_comes_near_its_quantile_and_begins_anew() -> None:
    x, y = rows(600)
    model = classifier(L.Dense(3), optimizer=SGD(0.0))
    privacy = tfdist.DPSGD(
        0.01, noise_multiplier=0.5, delta=1e-3, target_quantile=0.8, clip_learning_rate=0.5
    )
    norms = []
    for row in range(len(x)):
        with tf.GradientTape() as tape:
            loss = model.loss(y[row : row + 1], model(x[row : row + 1]))
        gradients = tape.gradient(loss, model.trainable_variables)
        norms.append(float(tf.linalg.global_norm(gradients)))
    for _ in range(2):
        shown = tfdist.fit(model, x, y, batch_size=100, epochs=10, verbose=0, privacy=privacy)
        clip = shown.history["l2_norm_clip"]
        assert clip[0] < 0.5 * clip[-1]
        assert np.quantile(norms, 0.6) < clip[-1] < np.quantile(norms, 0.95)
    assert len(model.variables) == 2


@pytest.mark.quick
def test_two_noises_cost_as_much_as_one() -> None:
    mechanism = Mechanism(1.0, 1.1, 256.0, target_quantile=0.5, count_noise=12.8)
    # A Gaussian of sensitivity 1 and one of 1/2 add up in 1 / sigma^2.
    together = mechanism.gradient_noise**-2 + (2 * mechanism.count_noise) ** -2
    assert together**-0.5 == pytest.approx(1.1)
    assert mechanism.gradient_noise == pytest.approx(1.1, rel=1e-3)
    assert Mechanism(1.0, 1.1, 256.0).gradient_noise == 1.1


def test_a_count_needs_noise_and_one_norm() -> None:
    x, y = rows()
    privacy = tfdist.DPSGD(1.0, noise_multiplier=2.0, delta=1e-3, target_quantile=0.5)
    with pytest.raises(ArgumentError, match="`count_noise` must be above"):
        tfdist.fit(classifier(), x, y, batch_size=8, verbose=0, privacy=privacy)
    for options in ({"clipping": "per_layer"}, {"clip_learning_rate": -1.0}):
        with pytest.raises(ArgumentError):
            noiseless(target_quantile=0.5, **options)
    with pytest.raises(ArgumentError, match="`target_quantile`"):
        noiseless(target_quantile=1.0)
