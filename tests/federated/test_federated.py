"""Federated training in one process, against a plain loop over clients."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.federated.reference import federated_averaging, in_float64, model_of, rows_of
from tfdist import _keras
from tfdist.errors import ArgumentError

SIZES = (40, 7, 70, 33)
PARTS = rows_of(*SIZES)
X, Y = (np.concatenate(arrays) for arrays in zip(*PARTS, strict=True))
IDS = np.repeat(range(len(SIZES)), SIZES)
OPTIONS: dict[str, Any] = {"batch_size": 16, "shuffle": False, "seed": 5, "verbose": 0}


@pytest.fixture(autouse=True)
def exact():
    with in_float64():
        yield


def momentum() -> Any:
    return keras.optimizers.SGD(0.1, momentum=0.9)


def adam() -> Any:
    return keras.optimizers.Adam(0.05)


def nadam() -> Any:  # one of its variables begins with 1
    return keras.optimizers.Nadam(0.05)


def largest_difference(ours: Any, theirs: Any) -> float:
    pairs = zip(ours.get_weights(), theirs.get_weights(), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "whole passes, and statistics of layers": (momentum, {}, {"norm": True, "dropout": 0.4}),
    "uniform weights": (adam, {"local_steps": 3, "weighting": "uniform"}, {"uniform": True}),
    "kept optimizers, pulled to the server, Adam on it": (
        nadam,
        {
            "local_steps": 3,
            "proximal": 0.3,
            "keep_optimizer": True,
            "server_optimizer": keras.optimizers.Adam(0.1),
        },
        {"proximal": 0.3, "keeps": True, "server": keras.optimizers.Adam(0.1)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_a_loop_over_clients(name):
    optimizer, settings, reference = CASES[name]
    reference = dict(reference)
    layers = {name: reference.pop(name) for name in ("norm", "dropout") if name in reference}
    ours, theirs = (model_of(optimizer(), **layers) for _ in range(2))
    averaging = tfdist.FedAvg(clients=IDS, **settings)
    history = tfdist.fit(ours, X, Y, epochs=3, federated=averaging, **OPTIONS)
    losses = federated_averaging(
        theirs, PARTS, 3, optimizer=optimizer, batch_size=16,
        local_steps=settings.get("local_steps"), **reference,
    )  # fmt: skip
    assert largest_difference(ours, theirs) < 1e-13
    np.testing.assert_allclose(history.history["loss"], losses, rtol=1e-12)


def plain(optimizer: Any, **options: Any) -> Any:
    """A model with all that a step may change besides weights."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, "tanh"),
            keras.layers.BatchNormalization(momentum=0.8),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], **options)
    return model


def test_one_client_is_plain_training_to_the_bit():
    """With a schedule by epoch, validation, and an end that a callback decides."""

    def callbacks() -> list[Any]:
        return [
            keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 / (1 + epoch)),
            keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=1.0),
        ]

    options = {**OPTIONS, "shuffle": True, "epochs": 4, "validation_split": 0.2}
    ours, theirs = plain(keras.optimizers.Adam()), plain(keras.optimizers.Adam())
    averaging = tfdist.FedAvg(local_epochs=1, keep_optimizer=True)
    a = tfdist.fit(ours, X, Y, federated=averaging, callbacks=callbacks(), **options)
    b = tfdist.fit(theirs, X, Y, callbacks=callbacks(), **options)
    assert largest_difference(ours, theirs) == 0.0
    assert a.history == b.history
    assert len(a.epoch) == 2
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations)


def test_schedules_go_on_where_optimizers_begin_anew():
    """SGD without momentum keeps nothing, so it must be as if optimizers were kept."""

    def decaying() -> Any:
        return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.3, 2, 0.5))

    for keeps in (False, True):
        ours, theirs = model_of(decaying()), model_of(decaying())
        averaging = tfdist.FedAvg(local_steps=3, clients=IDS, keep_optimizer=keeps)
        for epochs in (3,) if keeps else (2, 1):
            tfdist.fit(ours, X, Y, epochs=epochs, federated=averaging, **OPTIONS)
        federated_averaging(
            theirs, PARTS, 3, optimizer=decaying, batch_size=16, local_steps=3, keeps=True
        )
        assert largest_difference(ours, theirs) < 1e-13
        assert int(ours.optimizer.iterations) == 9


class Counting(keras.layers.Layer):
    """Keeps how often it was called, in a whole number, and a weight that nothing changes."""

    def build(self, shape: Any) -> None:
        self.still = self.add_weight(shape=(5,), initializer="uniform", name="still")
        self.calls = self.add_weight(
            shape=(), dtype="int64", initializer="zeros", trainable=False, name="calls"
        )

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.calls.assign(self.calls + 1)
        return x + 0.0 * self.still


def test_weights_that_nothing_changes_stay_and_counts_are_summed():
    keras.utils.set_random_seed(3)
    frozen = keras.layers.Dense(5, "tanh", trainable=False)
    counting = Counting()
    model = keras.Sequential([frozen, counting, keras.layers.Dense(3)])  # built by `fit`
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.1)
    model.compile(optimizer, loss, run_eagerly=True)
    tfdist.fit(model, X, Y, federated=tfdist.FedAvg(local_steps=2, clients=IDS), **OPTIONS)
    before = [*frozen.get_weights(), counting.still.numpy()]
    averaging = tfdist.FedAvg(local_steps=3, clients=IDS, clients_per_round=2)
    tfdist.fit(model, X, Y, epochs=2, federated=averaging, **OPTIONS)
    after = [*frozen.get_weights(), counting.still.numpy()]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert int(counting.calls.numpy()) == 4 * 2 + 2 * 2 * 3


def test_a_model_keeps_no_data_and_can_be_trained_otherwise():
    ours, theirs = model_of(momentum()), model_of(momentum())
    tfdist.fit(ours, X, Y, federated=tfdist.FedAvg(keep_optimizer=True), **OPTIONS)
    prepared = _keras.attached(ours).prepared
    assert prepared.own_round is None
    theirs.set_weights(ours.get_weights())
    tfdist.evaluate(ours, X, Y, verbose=0)
    for model in (ours, theirs):  # the optimizer of `ours` is as a new one
        tfdist.fit(model, X, Y, **OPTIONS)
    assert largest_difference(ours, theirs) == 0.0


def test_the_proximal_term_is_scaled_as_the_loss_is():
    settings = {"local_steps": 3, "clients": IDS, "proximal": 2.0}
    models = []
    for scaled in (False, True):
        optimizer = keras.optimizers.SGD(0.1)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
        model = model_of(optimizer)
        tfdist.fit(model, X, Y, epochs=2, federated=tfdist.FedAvg(**settings), **OPTIONS)
        models.append(model)
    assert largest_difference(*models) < 1e-12


class Own(keras.Model):
    """Has a step of its own, which returns what is no result of a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def train_step(self, data: Any) -> Any:
        return {**super().train_step(data), "raw": tf.reduce_mean(data[0])}


def test_logs_that_are_no_metrics_are_refused():
    model = Own()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    with pytest.raises(ArgumentError, match=r"results of metrics.*Received: .*raw"):
        tfdist.fit(model, X, Y, federated=tfdist.FedAvg(clients=IDS), **OPTIONS)


def test_a_checkpoint_of_another_federation_is_refused(tmp_path):
    model = model_of(momentum())
    first = tfdist.FedAvg(local_steps=1, clients=IDS)
    tfdist.fit(model, X, Y, federated=first, checkpoint=tmp_path, **OPTIONS)
    for other in (
        tfdist.FedAvg(local_steps=2, clients=IDS),
        tfdist.FedAvg(local_steps=1, clients=IDS // 2),
        None,
    ):
        with pytest.raises(ArgumentError, match="same training"):
            tfdist.fit(model, X, Y, federated=other, checkpoint=tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampler": tfdist.samplers.ClassBalanced()}, "ClassBalanced"),
        ({"augment": tfdist.Augment([keras.layers.RandomFlip()])}, "augment"),
        ({"steps_per_epoch": 3}, "steps_per_epoch=3"),
        ({"whole_batch": True}, "whole_batch=True"),
        ({"shard": tfdist.LocalShard(weight_by="workers")}, "weight_by='workers'"),
        ({"callbacks": [tfdist.LearningRateScaling(2.0)]}, "LearningRateScaling"),
        (
            {"privacy": tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=1.0, delta=1e-3)},
            "privacy",
        ),
        ({"strategy": tfdist.Zero(on="single")}, "a whole optimizer"),
        ({"federated": "fedavg"}, "federated='fedavg'"),
        ({"federated": tfdist.FedAvg(clients=IDS[:9])}, "shape"),
        ({"federated": tfdist.FedAvg(clients=IDS, clients_per_round=5)}, "and 4 clients"),
    ],
)
def test_what_cannot_be_federated_is_refused(options, match):
    options = {"federated": tfdist.FedAvg(clients=IDS), **OPTIONS, **options}
    with pytest.raises(ArgumentError, match=match):
        tfdist.fit(model_of(momentum()), X, Y, **options)


class Extreme(keras.metrics.Metric):
    """The largest, or smallest, size of a prediction."""

    def __init__(self, choose: Any, first: float) -> None:
        super().__init__(name="extreme")
        self.first, self.choose = first, choose
        self.value = self.add_weight(shape=(), initializer="zeros", dtype="float32")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        values = tf.concat(
            [[self.value.value], tf.cast(tf.reshape(tf.abs(y_pred), [-1]), tf.float32)], 0
        )
        self.value.assign(self.choose(values))

    def result(self) -> Any:
        return self.value + 0.0

    def reset_state(self) -> None:
        self.value.assign(self.first)


@pytest.mark.parametrize(("choose", "first"), [(tf.reduce_max, 0.0), (tf.reduce_min, 1e9)])
def test_a_metric_that_is_no_sum_is_refused(choose, first):
    model = model_of(momentum(), dropout=0.4)
    model.compile("sgd", model.loss, metrics=["accuracy", Extreme(choose, first)])
    with pytest.raises(ArgumentError, match=r"metric 'extreme.*no sum"):
        tfdist.fit(model, X, Y, federated=tfdist.FedAvg(clients=IDS), **OPTIONS)


def test_models_that_cannot_be_federated_are_refused():
    averaging = tfdist.FedAvg(clients=IDS)
    for change, match in (
        ({"optimizer": keras.optimizers.SGD(use_ema=True)}, "use_ema"),
        ({"steps_per_execution": 2}, "steps_per_execution=2"),
    ):
        model = model_of(momentum())
        model.compile(**{"optimizer": "sgd", "loss": model.loss, **change})
        with pytest.raises(ArgumentError, match=match):
            tfdist.fit(model, X, Y, federated=averaging, **OPTIONS)
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    with pytest.raises(ArgumentError, match="arrays"):
        tfdist.fit(model_of(momentum()), dataset, federated=averaging, verbose=0)


def test_the_drop_in_takes_federated():
    ours, theirs = model_of(momentum()), model_of(momentum())
    options = {**OPTIONS, "federated": tfdist.FedAvg(local_steps=1, clients=IDS)}
    with tfdist.drop_in("single"):
        ours.fit(X, Y, **options)
    tfdist.fit(theirs, X, Y, **options)
    assert largest_difference(ours, theirs) == 0.0
