"""What Horovod's users expect, on every rank; see `checks.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.checks import (
    ORDERED,
    StopAt,
    assert_weights_close,
    everywhere,
    place,
    same_everywhere,
    twins,
)
from tests.behaviour.registry import HOROVOD, check
from tests.equivalence.cases import clipped_sgd, crossentropy, mlp, table
from tfdist.errors import ArgumentError, DisagreementError

L = keras.layers


def trained(strategy: Any, **options: Any) -> tuple[Any, Any]:
    """Trains a model with a strategy, and an equal one with Keras."""
    ours, theirs = twins(lambda: keras.optimizers.SGD(0.1, momentum=0.9))
    tfdist.fit(ours, *table(), strategy=strategy, **ORDERED, **options)
    theirs.fit(*table(), **ORDERED, **options)
    same_everywhere(ours)
    return ours, theirs


@check(HOROVOD)
def fp16_compression_is_close(folder: Path) -> None:
    ours, theirs = trained(tfdist.Horovod(compression="fp16"))
    assert_weights_close(ours, theirs, 5e-3)
    assert any(
        (a != b).any() for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True)
    )


@check(full=(HOROVOD,))
def bf16_compression_is_close(folder: Path) -> None:
    assert_weights_close(*trained(tfdist.Horovod(compression="bf16")), 4e-2)


@check(HOROVOD)
def predivided_gradients_are_exact(folder: Path) -> None:
    assert_weights_close(*trained(tfdist.Horovod(gradient_predivide_factor=4.0)))


@check(HOROVOD)
def bfloat16_policy_trains_and_predicts(folder: Path) -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        ours, theirs = trained("auto")
        x, _ = table(33)
        np.testing.assert_allclose(
            np.asarray(tfdist.predict(ours, x, verbose=0), "float32"),
            np.asarray(theirs.predict(x, verbose=0), "float32"),
            atol=0.1,
        )
    finally:
        keras.config.set_dtype_policy("float32")


@check(HOROVOD)
def adasum_adds_orthogonal_gradients_and_averages_equal_ones(folder: Path) -> None:
    ranks = place().num_replicas
    model = keras.Sequential([keras.Input((ranks,)), L.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.SGD(1.0), loss=lambda y, p: -p[:, 0])
    before = model.get_weights()[0]
    strategy = tfdist.Horovod(op="adasum")
    # One example a rank, each with a gradient along an axis of its own: their sum.
    options = {"batch_size": ranks, "shuffle": False, "verbose": 0, "strategy": strategy}
    tfdist.fit(model, np.eye(ranks, dtype="float32"), np.zeros((ranks, 1)), **options)
    np.testing.assert_allclose(model.get_weights()[0], before + 1.0, rtol=1e-5)
    # The same example on each: their mean.
    x = np.ones((ranks, ranks), "float32")
    options["strategy"] = tfdist.Horovod(op="adasum", compression="bf16")
    tfdist.fit(model, x, np.zeros((ranks, 1)), **options)
    np.testing.assert_allclose(model.get_weights()[0], before + 2.0, rtol=1e-5)
    same_everywhere(model)


@check(HOROVOD)
def dense_and_gathered_rows_of_an_embedding_are_equal(folder: Path) -> None:
    words = np.random.default_rng(0).integers(0, 20, size=(101, 6))
    labels = (words.sum(1) % 3).astype("int64")
    models = [
        keras.Sequential([L.Embedding(20, 4), L.GlobalAveragePooling1D(), L.Dense(3)])
        for _ in range(2)
    ]
    for model in models:
        model.build((None, 6))
    models[1].set_weights(models[0].get_weights())
    for model, as_dense in zip(models, (True, False), strict=True):
        model.compile("sgd", crossentropy())
        strategy = tfdist.Horovod(sparse_as_dense=as_dense)
        tfdist.fit(model, words, labels, strategy=strategy, **ORDERED)
    assert_weights_close(*models)


def large(optimizer: Any) -> Any:
    """A model of more weights than those up to which signals travel with gradients."""
    layers = [L.Dense(1024), L.BatchNormalization(), L.Dense(1024, "relu"), L.Dense(3)]
    model = keras.Sequential([keras.Input((20,)), *layers])
    model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    assert place().num_workers == 1 or tfdist.init().strategy.signals_lead(model.count_params())
    return model


@check(HOROVOD)
def a_large_model_stops_at_the_same_step(folder: Path) -> None:
    ours, theirs = (large(clipped_sgd()) for _ in range(2))
    for model in (ours, theirs):
        model.layers[1].synchronized = True
    theirs.set_weights(ours.get_weights())
    last = StopAt(3, place().num_workers - 1)
    tfdist.fit(ours, *table(), callbacks=[last], epochs=2, **ORDERED)
    theirs.fit(*table(), callbacks=[StopAt(3, None)], epochs=2, **ORDERED)
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations) == 4
    assert_weights_close(ours, theirs, 1e-4)
    same_everywhere(ours)


@check(HOROVOD)
def a_large_model_is_left_as_it_was_by_a_step_without_agreement(folder: Path) -> None:
    model = large(keras.optimizers.Adam(use_ema=True, weight_decay=0.01))
    state: list[Any] = []

    def keep(batch: int, logs: Any = None) -> None:
        state[:] = [np.array(v) for v in all_variables(model)]

    x, y = table(100)
    x[55:] += place().worker_index
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
    kept = keras.callbacks.LambdaCallback(on_train_batch_end=keep)
    with pytest.raises(DisagreementError):
        tfdist.fit(model, batches, callbacks=[kept], verbose=0)
    assert int(model.optimizer.iterations) == 5
    for variable, before in zip(all_variables(model), state, strict=True):
        np.testing.assert_array_equal(np.array(variable), before, variable.path)


def all_variables(model: Any) -> list[Any]:
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]


@check(HOROVOD)
def ranks_begin_with_the_first_one_s_weights(folder: Path) -> None:
    keras.utils.set_random_seed(place().worker_index)
    model = mlp("adam")
    different = everywhere(float(np.sum(model.get_weights()[0])))
    assert len(set(different)) == len(different)
    tfdist.fit(model, *table(65), **ORDERED)
    same_everywhere(model)


@check(HOROVOD)
def backward_passes_per_step_is_gradient_accumulation(folder: Path) -> None:
    ours, theirs = twins(lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    tfdist.fit(ours, *table(640), **ORDERED)
    theirs.fit(*table(640), **ORDERED)
    assert_weights_close(ours, theirs)


@check(HOROVOD)
def init_s_strategy_and_seed_are_what_fit_uses(folder: Path) -> None:
    before = tfdist.init()
    half = tfdist.Horovod(compression="fp16")
    try:
        session = tfdist.init(half, seed=3)
        assert tfdist.strategies.session.current().strategy is session.strategy is half
        assert tfdist.strategies.session.current(tfdist.Horovod()).seed == 3
    finally:
        tfdist.init(before.strategy, seed=7)


@check(HOROVOD)
def horovod_s_own_optimizer_is_refused(folder: Path) -> None:
    import horovod.tensorflow.keras as hvd

    model = mlp("sgd")
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), crossentropy())
    with pytest.raises(ArgumentError, match="DistributedOptimizer"):
        tfdist.fit(model, *table(64), **ORDERED)


@check(HOROVOD)
def process_sets_train_apart(folder: Path) -> None:  # last: it connects the ranks anew
    ranks = place().num_replicas
    me = place().worker_index
    with pytest.raises(ArgumentError, match=r"process_sets=\[\[0\]\]"):
        tfdist.Horovod(process_sets=[[0]])  # where is the other rank?
    strategy = tfdist.Horovod(process_sets=[[rank] for rank in range(ranks)])
    assert strategy.place.num_replicas == 1
    x, y = table(128 + me)
    model = mlp("sgd")
    expected = keras.models.clone_model(model)
    expected.set_weights(model.get_weights())
    expected.compile("sgd", crossentropy())
    tfdist.fit(model, x, y, strategy=strategy, **ORDERED)
    expected.fit(x, y, **ORDERED)
    assert_weights_close(model, expected)
