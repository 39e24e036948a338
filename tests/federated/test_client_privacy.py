"""Client-level privacy: what a client contributes, the noise, and what is counted."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.checkpoint_checks import Stop, StoppedError
from tests.federated.reference import federated_averaging, in_float64, model_of, rows_of
from tests.strategies.devices import Devices
from tfdist.errors import ArgumentError
from tfdist.federated import clients as of
from tfdist.federated.plan import RoundPlan
from tfdist.privacy.mechanism.client_updates import ClientUpdates
from tfdist.samplers import Sequential

SIZES = (40, 7, 70, 1, 33, 20)
PARTS = rows_of(*SIZES)
X, Y = (np.concatenate(arrays) for arrays in zip(*PARTS, strict=True))
IDS = np.repeat(range(len(SIZES)), SIZES)
OPTIONS: dict[str, Any] = {"batch_size": 16, "shuffle": False, "seed": 5, "verbose": 0}


def adam() -> Any:
    return keras.optimizers.Adam(0.05)


def averaging(**settings: Any) -> Any:
    """Two local steps of all clients, which are protected."""
    given = {"l2_norm_clip": 0.2, "noise_multiplier": 1.0, "delta": 1e-2}
    own = ("clients", "server_optimizer", "local_steps", "weighting")
    rest = {name: settings.pop(name) for name in own if name in settings}
    privacy = tfdist.ClientDP(**{**given, **settings})
    options = {"clients": IDS, "local_steps": 2, "weighting": "uniform", "privacy": privacy}
    return tfdist.FedAvg(**{**options, **rest})


def plan_of(federated: Any, seed: int = 5) -> RoundPlan:
    devices = Devices(1)
    clients = of.of_ids(federated.clients, len(federated.clients), devices, is_local=False)
    return RoundPlan(federated, clients, devices.place, Sequential(), 16, seed)


def test_without_noise_it_is_a_loop_that_clips():
    federated = averaging(noise_multiplier=0.0, sampling_probability=0.6)
    plan = plan_of(federated)
    drawn = [plan.chosen(number).tolist() for number in range(5)]
    assert len({len(clients) for clients in drawn}) > 1
    with in_float64():
        ours, theirs = (model_of(keras.optimizers.SGD(0.3)) for _ in range(2))
        history = tfdist.fit(ours, X, Y, epochs=5, federated=federated, **OPTIONS)
        losses = federated_averaging(
            theirs, PARTS, 5, optimizer=lambda: keras.optimizers.SGD(0.3), batch_size=16,
            local_steps=2, chosen=drawn.__getitem__, clip=(0.2, 0.6 * 6),
        )  # fmt: skip
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)  # norms are rounded up by 1e-6
    np.testing.assert_allclose(history.history["loss"], losses, rtol=1e-5)
    assert math.isinf(history.privacy.epsilon)


def test_clients_weigh_by_their_rows_up_to_a_cap():
    """The divisor stays that of equal weights: it must not show how many rows clients have."""
    federated = averaging(noise_multiplier=0.0, max_examples=30, weighting="examples")
    assert plan_of(federated).round(0).weights.tolist() == [1, 7 / 30, 1, 1 / 30, 1, 20 / 30]
    with in_float64():
        ours, theirs = (model_of(keras.optimizers.SGD(0.3)) for _ in range(2))
        tfdist.fit(ours, X, Y, epochs=3, federated=federated, **OPTIONS)
        federated_averaging(
            theirs, PARTS, 3, optimizer=lambda: keras.optimizers.SGD(0.3), batch_size=16,
            local_steps=2, clip=(0.2, 6), cap=30,
        )  # fmt: skip
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)  # norms are rounded up by 1e-6


def test_an_adaptive_norm_follows_a_quantile_as_in_a_loop():
    settings = {"target_quantile": 0.7, "clip_learning_rate": 0.9}
    federated = averaging(
        noise_multiplier=0.0, sampling_probability=0.6, l2_norm_clip=0.02, **settings
    )
    plan = plan_of(federated)
    drawn = [plan.chosen(number).tolist() for number in range(6)]
    norms: list[float] = []
    with in_float64():
        ours, theirs = (model_of(keras.optimizers.SGD(0.3)) for _ in range(2))
        history = tfdist.fit(ours, X, Y, epochs=6, federated=federated, **OPTIONS)
        federated_averaging(
            theirs, PARTS, 6, optimizer=lambda: keras.optimizers.SGD(0.3), batch_size=16,
            local_steps=2, chosen=drawn.__getitem__, clip=(0.02, 0.6 * 6),
            quantile=(0.7, 0.9), norms=norms,
        )  # fmt: skip
    np.testing.assert_allclose(history.history["l2_norm_clip"], norms, rtol=1e-5)
    assert max(norms) > 3 * norms[0]
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_an_adaptive_norm_goes_on_from_a_checkpoint(tmp_path):
    def trained(epochs: int, checkpoint: Any = None) -> Any:
        federated = averaging(target_quantile=0.5, l2_norm_clip=0.02, count_noise=1.0, seed=1)
        model = model_of(keras.optimizers.SGD(0.1))
        options = {**OPTIONS, "checkpoint": checkpoint}
        history = tfdist.fit(model, X, Y, epochs=epochs, federated=federated, **options)
        return history.history["l2_norm_clip"], model.get_weights()

    norms, weights = trained(4)
    assert len(set(norms)) == 4
    trained(2, tmp_path)
    resumed, again = trained(4, tmp_path)
    assert resumed == norms
    for a, b in zip(weights, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_noise_of_updates_and_of_the_count_cost_what_is_accounted():
    """Two Gaussian mechanisms: 1 / z^2 = 1 / z_updates^2 + 1 / (2 z_count)^2."""
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(200, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.zeros((300, 40), "float32"), np.zeros((300, 200), "float32")
    weights = [model.get_weights()[0]]
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights()[0])
    )
    federated = averaging(
        clients=np.arange(300) // 3, l2_norm_clip=0.7, noise_multiplier=1.5, count_noise=1.0,
        sampling_probability=1.0, target_quantile=0.5, clip_learning_rate=1.0,
    )  # fmt: skip
    history = tfdist.fit(
        model, x, y, epochs=40, verbose=0, federated=federated, callbacks=[keep]
    )
    norms = np.array(history.history["l2_norm_clip"])
    noise = (1.5**-2 - 2.0**-2) ** -0.5
    moved = np.diff(np.array(weights), axis=0).reshape(40, -1) * 100 / norms[:, None] / noise
    square = float((moved[:4] ** 2).sum())
    assert abs(square - 4 * 8000) < 5 * math.sqrt(2 * 4 * 8000)
    # All updates are 0, so all clients vote that they are within the norm.
    votes = -np.diff(np.log(norms)) + 0.5
    counts = (votes - 1) * 100
    assert abs((counts**2).sum() - 39) < 5 * math.sqrt(2 * 39)
    assert abs(counts.mean()) < 5 / math.sqrt(39)
    plain = tfdist.privacy.epsilon(
        sampling_probability=1.0, noise_multiplier=1.5, steps=40, delta=1e-2
    )
    assert history.privacy.epsilon == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_quantile": 1.0}, "target_quantile"),
        ({"target_quantile": 0.5, "count_noise": 0.5}, "`count_noise` must be above"),
    ],
)
def test_an_adaptive_norm_is_refused_before_training(settings, message):
    with pytest.raises(ArgumentError, match=message):
        tfdist.fit(
            model_of(keras.optimizers.SGD(0.1)),
            X,
            Y,
            federated=averaging(**settings),
            **OPTIONS,
        )


def mechanism(noise: float = 0.0, clip: float = 0.7, clients: int = 10) -> ClientUpdates:
    return ClientUpdates(clip, noise, 0.5, clients, Devices(1))


@pytest.mark.quick
def test_no_client_contributes_more_than_the_norm():
    random = np.random.default_rng(0)
    clip = mechanism().clip
    for scale in (1e-30, 0.1, 0.999, 1.0, 1.001, 50.0, 1e30):
        update = [random.normal(size=shape) for shape in ((300, 50), (7,), ())]
        norm = math.sqrt(sum((u**2).sum() for u in update))
        sent = [(u * 0.7 * scale / norm).astype("float32") for u in update]
        clipped = [c.numpy().astype(float) for c in clip([tf.constant(s) for s in sent])]
        size = math.sqrt(sum((c**2).sum() for c in clipped))
        assert size <= 0.7
        assert size == pytest.approx(0.7 * min(1.0, scale), rel=1e-5)
    for bad in (np.inf, np.nan):
        clipped = clip([tf.constant([1.0, bad]), tf.constant([2.0])])
        assert [c.numpy().tolist() for c in clipped] == [[0, 0], [0]]


def test_noise_on_updates_of_zero_has_the_right_deviation():
    """A chi-squared test of 32000 numbers: within 5 deviations, which are 2 %."""
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(200, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.zeros((30, 40), "float32"), np.zeros((30, 200), "float32")
    weights = [model.get_weights()[0]]
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights()[0])
    )
    federated = averaging(
        clients=np.arange(30) // 3, l2_norm_clip=0.7, noise_multiplier=1.5,
        sampling_probability=0.5,
    )  # fmt: skip
    history = tfdist.fit(
        model, x, y, epochs=4, verbose=0, federated=federated, callbacks=[keep]
    )
    moved = np.diff(np.array(weights), axis=0).reshape(4, -1) * (0.5 * 10)
    square = float(((moved / (1.5 * 0.7)) ** 2).sum())
    assert abs(square - moved.size) < 5 * math.sqrt(2 * moved.size)
    assert abs(moved.mean()) < 5 * 1.05 / math.sqrt(moved.size)
    assert np.abs(np.corrcoef(moved)[np.triu_indices(4, 1)]).max() < 5.5 / math.sqrt(8000)
    places = moved / (1.5 * 0.7 / 64)  # on a grid that no client changes
    np.testing.assert_allclose(places, np.round(places), atol=0.03)
    assert history.privacy.secret


def test_rounds_are_counted_and_the_statement_says_clients():
    model = model_of(keras.optimizers.SGD(0.1))
    federated = averaging(noise_multiplier=6.0, seed=1)  # of all clients: a closed form
    report = tfdist.fit(model, X, Y, epochs=3, federated=federated, **OPTIONS).privacy
    expected = tfdist.privacy.epsilon(
        sampling_probability=1.0, noise_multiplier=6.0, steps=3, delta=1e-2
    )
    assert report.epsilon == expected
    assert report.ledger.unit == "client"
    assert "in 3 rounds, for each client" in report.line()
    assert "differ by all examples of one client, added or removed" in report.statement()
    assert not report.secret
    target = averaging(noise_multiplier=None, target_epsilon=8.0)
    report = tfdist.fit(model, X, Y, epochs=4, verbose=0, federated=target).privacy
    assert report.ledger.steps == 7  # with those before
    assert 7.9 < report.epsilon <= 8.0
    with pytest.raises(ArgumentError, match="same `clients`"):
        tfdist.fit(model, X, Y, verbose=0, federated=averaging(clients=IDS // 2))
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(ArgumentError, match="examples, users or clients"):
        tfdist.fit(model, X, Y, verbose=0, privacy=privacy)


def test_what_is_released_does_not_show_who_was_drawn():
    """Rounds in which nobody is drawn count, and move what clients would have moved."""
    model = model_of(keras.optimizers.Adam(0.1), dropout=0.3)
    before = model.get_weights()
    seeds = [v for v in model.non_trainable_variables if "seed" in v.name]
    first = [int(v.numpy()[1]) for v in seeds]
    federated = averaging(noise_multiplier=0.0, sampling_probability=1e-9)
    tfdist.fit(model, X, Y, epochs=3, federated=federated, **OPTIONS)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(model.optimizer.iterations) == 6
    assert [int(v.numpy()[1]) - n for v, n in zip(seeds, first, strict=True)] == [3 * 2**20]
    federated = averaging(noise_multiplier=0.0, sampling_probability=0.5)
    tfdist.fit(model, X, Y, epochs=3, federated=federated, **OPTIONS)
    assert int(model.optimizer.iterations) == 12
    assert [int(v.numpy()[1]) - n for v, n in zip(seeds, first, strict=True)] == [6 * 2**20]
    moments = [v.numpy() for v in model.optimizer.variables if "velocity" in v.path]
    assert not any(value.any() for value in moments)


@pytest.mark.quick
def test_a_batch_does_not_show_how_many_rows_other_clients_have() -> None:
    """Clients of 16 rows each fill batches of 16. A static size would say so to each one."""
    ids, plain = np.repeat(np.arange(4), 16), tfdist.FedAvg(clients=np.repeat([0, 1], 16))
    assert plan_of(plain).full_batch == 16
    assert plan_of(averaging(clients=ids)).full_batch is None
    assert plan_of(averaging(clients=ids[:-1])).full_batch is None


@pytest.mark.quick
def test_clients_are_drawn_independently():
    """Sizes of rounds are binomial; two clients, and two rounds, are uncorrelated."""
    federated = averaging(clients=np.arange(20), sampling_probability=0.3)
    plan = plan_of(federated, seed=2**100 + 1)
    drawn = np.zeros((2000, 20))
    for number in range(2000):
        drawn[number, plan.chosen(number)] = 1
    assert drawn.mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / drawn.size))
    variance = drawn.sum(1).var()
    assert variance == pytest.approx(20 * 0.21, rel=5 * math.sqrt(2 / 2000))
    pairs = np.corrcoef(drawn.T)[np.triu_indices(20, 1)]
    assert np.abs(pairs).max() < 5 / math.sqrt(2000)
    later = np.corrcoef(drawn[1:].ravel(), drawn[:-1].ravel())[0, 1]
    assert abs(later) < 5 / math.sqrt(drawn.size)
    streams = {int(s) for n in range(50) for s in plan.of_replica(n, 0).streams}
    assert len(streams) == sum(len(plan.chosen(n)) for n in range(50))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("clients", "probability", "rounds", "delta", "expected"),
    [(100, 0.3, 100, 1e-3, 17.1), (1000, 0.05, 200, 1e-4, 4.0), (10000, 0.01, 500, 1e-5, 1.33),
     (10, 1.0, 50, 1e-2, 40.6)],
)  # fmt: skip
def test_epsilon_of_rounds(clients, probability, rounds, delta, expected):
    phase = tfdist.privacy.Phase(probability, 1.0, rounds, num_rows=clients, unit="client")
    ledger = tfdist.privacy.Ledger((phase,))
    found = ledger.epsilon(delta, coarse=True)
    assert found == pytest.approx(expected, abs=0.06 if expected > 2 else 6e-3)


DP = tfdist.ClientDP(1.0, noise_multiplier=1.0, delta=1e-3)
CAPPED = tfdist.ClientDP(1.0, noise_multiplier=1.0, delta=1e-3, max_examples=10)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"clients_per_round": 2}, "clients_per_round=2"),
        ({"weighting": "examples"}, "weighting='examples'"),
        ({"keep_optimizer": True}, "keep_optimizer=True"),
        ({"local_steps": None}, "local_steps=None"),
        ({"privacy": "ClientDP"}, "tfdist.ClientDP, a tfdist.DPSGD or None"),
        ({"privacy": CAPPED}, "weighting='uniform'"),
    ],
)
def test_settings_that_do_not_protect_clients_are_refused(settings, match):
    options = {"local_steps": 1, "weighting": "uniform", "privacy": DP, **settings}
    with pytest.raises(ArgumentError, match=match):
        tfdist.FedAvg(**options)


@pytest.mark.quick
@pytest.mark.parametrize(
    "settings",
    [
        {"l2_norm_clip": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": None},
        {"target_epsilon": 1.0},
        {"delta": None},
        {"delta": 1.0},
        {"sampling_probability": 0.0},
        {"sampling_probability": 1.5},
        {"accountant": "moments"},
        {"seed": -1},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    given = {"l2_norm_clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3, **settings}
    with pytest.raises(ArgumentError, match="Received: "):
        tfdist.ClientDP(**given)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"federated": averaging(clients=None)}, r"clients=ids"),
        ({"class_weight": "balanced"}, "class_weight='balanced'"),
        ({"compression": "bf16"}, "compression='bf16'"),
        ({"privacy": tfdist.DPSGD(1.0, noise_multiplier=1.0, delta=1e-3)}, "not both"),
        ({"callbacks": [keras.callbacks.EarlyStopping("loss")]}, "monitor='loss'"),
        ({"callbacks": [keras.callbacks.EarlyStopping()], "validation_split": 0.2}, "monitor"),
        ({"privacy": DP, "federated": None}, "of tfdist.FedAvg"),
    ],
)
def test_what_does_not_protect_clients_is_refused(options, match):
    model = model_of(keras.optimizers.SGD(0.1))
    with pytest.raises(ArgumentError, match=match):
        tfdist.fit(model, X, Y, **{**OPTIONS, "federated": averaging(), **options})


class Counting(keras.layers.Layer):
    """Counts how often it was called."""

    def build(self, shape: Any) -> None:
        self.calls = self.add_weight(
            shape=(), dtype="int64", initializer="zeros", trainable=False, name="calls"
        )

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.calls.assign(self.calls + 1)
        return x


def test_layers_whose_state_would_show_clients_are_refused():
    for layer, match in (
        (keras.layers.BatchNormalization(), "BatchNormalization"),
        (Counting(), "calls"),
    ):
        model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(3)])
        model.compile("sgd", "mse")
        with pytest.raises(ArgumentError, match=match):
            tfdist.fit(model, X, np.eye(3)[Y], federated=averaging(), **OPTIONS)


class Counted(keras.layers.Layer):
    """Has a count, which a metric holds and writes."""

    def build(self, shape: Any) -> None:
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        return x


class HoldsCount(keras.metrics.Sum):
    def __init__(self, layer: Any) -> None:
        super().__init__(name="held")
        self.count = layer.count

    def update_state(self, y: Any, p: Any, sample_weight: Any = None) -> None:
        self.count.assign_add(keras.ops.sum(y))


def test_a_metric_that_holds_a_weight_is_refused() -> None:
    layer = Counted()
    model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(3)])
    model.compile("sgd", "mse", metrics=[HoldsCount(layer)])
    with pytest.raises(ArgumentError, match="no metric may hold a weight"):
        tfdist.fit(model, X, np.eye(3)[Y], federated=averaging(), **OPTIONS)


class ReadsLoss(keras.Model):
    """Its own step turns the gradients around if the loss of earlier rows is large."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        tracker = self.metrics[0]
        sign = 1 - 2 * tf.cast(tracker.result() > 1000, "float32")
        self.optimizer.apply([g * sign for g in gradients], self.trainable_variables)
        tracker.update_state(loss)
        return {"loss": tracker.result()}


class TurnsAround(keras.optimizers.SGD):
    """Does the same in an update."""

    tracker: Any = None

    def update_step(self, gradient: Any, variable: Any, rate: Any) -> None:
        read = 0.0 if self.tracker is None else self.tracker.result()
        sign = 1 - 2 * keras.ops.cast(read > 1000, "float32")
        super().update_step(gradient, variable, rate * sign)


@pytest.mark.parametrize("reader", ["step", "optimizer"])
def test_metrics_carry_nothing_from_client_to_client(reader: str) -> None:
    """With and without the first of six clients, whose loss is large; at most *C*."""

    def update(first: int) -> np.ndarray[Any, Any]:
        keras.utils.set_random_seed(7)
        inputs = keras.Input((3,))
        cls = ReadsLoss if reader == "step" else keras.Model
        model = cls(inputs, keras.layers.Dense(1)(inputs))
        optimizer = TurnsAround(0.1) if reader == "optimizer" else keras.optimizers.SGD(0.1)
        model.compile(optimizer, "mse")
        vars(optimizer)["tracker"] = model.metrics[0]
        before = np.concatenate([w.ravel() for w in model.get_weights()])
        federated = averaging(
            clients=ids[4 * first :], local_steps=1, l2_norm_clip=1.0, noise_multiplier=0.0
        )
        rows = x[4 * first :], y[4 * first :]
        tfdist.fit(model, *rows, federated=federated, **{**OPTIONS, "batch_size": 4})
        after = np.concatenate([w.ravel() for w in model.get_weights()])
        moved: np.ndarray[Any, Any] = (before - after) * (6 - first)
        return moved

    random = np.random.default_rng(0)
    x, y = (random.normal(size=(24, n)).astype("float32") * 5 for n in (3, 1))
    ids = np.repeat(np.arange(6), 4)
    y[ids == 0] *= 100
    contribution = float(np.linalg.norm(update(0) - update(1)))
    assert contribution == pytest.approx(1.0, rel=1e-4)  # it is clipped


def test_a_server_that_reads_a_metric_is_refused() -> None:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    server = TurnsAround(1.0)
    # Keras makes an optimizer anew for each training, from its settings: this one is not saved.
    TurnsAround.tracker = model.metrics[0]
    try:
        with pytest.raises(ArgumentError, match="server's optimizer must depend on clients by"):
            tfdist.fit(model, X, Y, federated=averaging(server_optimizer=server), **OPTIONS)
    finally:
        TurnsAround.tracker = None


def test_sums_over_many_clients_are_hardly_rounded() -> None:
    """In a float32 chain, each client of the second half would push almost twice as far."""
    half = 1024
    pushes = np.repeat([1.0, -1.001 * half * 2.0**-25], half).astype("float32")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(
        keras.optimizers.SGD(1.0), lambda y_true, y_pred: keras.ops.mean(y_pred, axis=-1)
    )
    before = model.get_weights()[0]
    federated = averaging(
        clients=np.arange(2 * half), local_steps=1, l2_norm_clip=2.0, noise_multiplier=0.0
    )
    options = {**OPTIONS, "batch_size": 1}
    tfdist.fit(model, pushes[:, None], 0 * pushes, epochs=1, federated=federated, **options)
    total = float((before - model.get_weights()[0])[0, 0]) * 2 * half
    exact = float(pushes.astype("float64").sum())
    assert total == pytest.approx(exact, abs=half * 2.0**-22)  # of the mean, in float32


def remembering() -> Any:
    remembered = tf.Variable(0.0)

    def call(x: Any) -> Any:
        remembered.assign(tf.reduce_max(x))
        return x

    return keras.layers.Lambda(call)


def by_python(x: Any) -> Any:
    return x * tf.ensure_shape(tf.numpy_function(lambda: np.float32(1), [], tf.float32), [])


def staged(x: Any) -> Any:
    with tf.control_dependencies([tf.raw_ops.Stage(values=[tf.reduce_max(x)])]):
        return tf.identity(x)


@pytest.mark.parametrize(
    ("layer", "options", "match"),
    [
        (lambda: keras.layers.Lambda(lambda x: x + tf.random.normal([3])), {}, "keras.random"),
        (lambda: keras.layers.Lambda(by_python), {}, "PyFunc"),
        (remembering, {}, "AssignVariableOp"),
        (lambda: keras.layers.Lambda(staged), {}, "operation Stage"),
        (lambda: keras.layers.Dense(3), {"run_eagerly": True}, "run_eagerly"),
        (lambda: keras.layers.SpectralNormalization(keras.layers.Dense(3)), {}, "constraint"),
    ],
    ids=["random", "Python", "variable", "staged", "eager", "spectral"],
)
def test_steps_that_may_remember_a_client_are_refused(layer, options, match):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), layer()])
    model.compile("sgd", "mse", **options)
    before = model.get_weights()
    with pytest.raises(ArgumentError, match=match):
        tfdist.fit(model, X, np.eye(3)[Y], federated=averaging(), **OPTIONS)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_round_that_fails_leaves_no_weights_of_a_client():
    model = keras.Sequential([
        keras.Input((6,)),
        keras.layers.Lambda(lambda x: tf.debugging.check_numerics(x, "no number")),
        keras.layers.Dense(3),
    ])  # fmt: skip
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    x, y = X.astype("float32"), np.eye(3)[Y]
    x[IDS == 3] = np.nan  # after three clients have trained
    federated = averaging(sampling_probability=1.0)
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    before = [v.numpy() for v in variables]
    with pytest.raises(tf.errors.InvalidArgumentError, match="no number"):
        tfdist.fit(model, x, y, federated=federated, **OPTIONS)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert tfdist.privacy.model_history.of(model).ledger.steps == 1  # it counts nevertheless


@pytest.mark.full
def test_a_stopped_training_goes_on_and_counts_all_rounds(tmp_path):
    """With a known seed bit by bit; with secret ones, rounds that were lost count too."""

    def trained(*callbacks: Any, **options: Any) -> Any:
        model = model_of(keras.optimizers.SGD(0.1), dropout=0.3)
        federated = averaging(
            sampling_probability=0.7, server_optimizer=adam(), seed=options.get("seed", 5)
        )
        options = {**OPTIONS, "epochs": 5, "callbacks": list(callbacks), **options}
        return model, tfdist.fit(model, X, Y, federated=federated, **options).privacy

    expected, _ = trained()
    known, secret = tmp_path / "known", tmp_path / "secret"
    with pytest.raises(StoppedError):
        trained(Stop(3), checkpoint=known)
    ours, report = trained(checkpoint=known)
    for a, b in zip(ours.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert report.ledger.steps == 5
    every = tfdist.Checkpoint(secret, every=2)
    with pytest.raises(StoppedError):
        trained(Stop(3), checkpoint=every, seed=None)  # the third round is lost
    _, report = trained(checkpoint=every, seed=None)
    assert report.ledger.steps == 6
    assert report.secret


@pytest.mark.full
def test_a_budget_ends_training_before_it_is_exceeded():
    model = model_of(keras.optimizers.SGD(0.1))
    budget = tfdist.PrivacyBudget(2.0)
    federated = averaging(noise_multiplier=4.0)
    history = tfdist.fit(
        model, X, Y, epochs=50, verbose=0, federated=federated, callbacks=[budget]
    )
    assert 1.8 < history.privacy.epsilon <= 2.0
    assert history.privacy.ledger.steps == len(history.epoch) < 50
    assert history.history["epsilon"] == sorted(history.history["epsilon"])
