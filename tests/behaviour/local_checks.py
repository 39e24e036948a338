"""What must hold when each worker passes the rows that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tests.behaviour.checks import ORDERED, assert_weights_close, level, place, twins
from tests.behaviour.registry import HOROVOD, MULTI_WORKER, check
from tests.equivalence.cases import mlp, private_mlp, table
from tfdist.errors import ArgumentError

ROWS = 961
# Rows of the first worker: as many, 1 in 100, one, none.
SPLITS = (ROWS // 2, ROWS // 101, 1, 0)


def by_class_of_worker(first: int) -> tuple[Any, Any]:
    """The data with each worker's rows class by class, as samplers number them."""
    x, y = table()
    parts = [np.arange(first), np.arange(first, ROWS)]
    order = np.concatenate([part[np.argsort(y[part], kind="stable")] for part in parts])
    return x[order], y[order]


def own(first: int, *arrays: Any) -> list[Any]:
    """This worker's rows of arrays that are cut in two."""
    rows = slice(0, first) if place().worker_index == 0 else slice(first, ROWS)
    return [array[rows] for array in arrays]


@check(HOROVOD, full=(MULTI_WORKER,))
def any_split_equals_one_process(folder: Path) -> None:
    ours, theirs = twins()
    options = {**ORDERED, "epochs": 2}
    for first in SPLITS:
        level(ours, theirs)
        a = tfdist.fit(ours, *own(first, *table()), shard="local", **options)
        b = theirs.fit(*table(), **options)
        assert_weights_close(ours, theirs)
        for name in b.history:
            np.testing.assert_allclose(a.history[name], b.history[name], rtol=1e-5)


@check(MULTI_WORKER)
def samplers_draw_from_the_union(folder: Path) -> None:
    samplers = tfdist.samplers
    first = ROWS // 101
    x, y = by_class_of_worker(first)
    ours, whole = twins()
    for sampler in (
        samplers.Uniform(),
        samplers.ClassBalanced(),
        samplers.Undersample(),
        samplers.Oversample(),
        samplers.Stratified(),
    ):
        level(ours, whole)
        options = {"batch_size": 64, "verbose": 0, "sampler": sampler, "seed": 3}
        a = tfdist.fit(ours, *own(first, x, y), shard="local", **options)
        b = tfdist.fit(whole, x, y, **options)
        assert_weights_close(ours, whole)
        np.testing.assert_allclose(a.history["loss"], b.history["loss"], rtol=1e-5)


@check(HOROVOD)
def labels_of_every_kind_travel_as_counts(folder: Path) -> None:
    first = 300
    x, y = by_class_of_worker(first)
    several = np.stack([y == 0, y <= 1], 1).astype("float32")
    for targets, loss in (
        (keras.utils.to_categorical(y), keras.losses.CategoricalCrossentropy(from_logits=True)),
        (several, keras.losses.BinaryCrossentropy(from_logits=True)),
    ):
        models = [
            keras.Sequential([keras.Input((20,)), keras.layers.Dense(targets.shape[1])])
            for _ in range(2)
        ]
        models[1].set_weights(models[0].get_weights())
        for model in models:
            model.compile("sgd", loss)
        sampler = tfdist.samplers.Stratified()
        options = {"batch_size": 64, "verbose": 0, "sampler": sampler, "seed": 3}
        tfdist.fit(models[0], *own(first, x, targets), shard="local", **options)
        losses = [
            tfdist.evaluate(models[0], *own(first, x, targets), shard="local", verbose=0),
            models[0].evaluate(x, targets, verbose=0),
        ]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@check(MULTI_WORKER)
def weights_are_found_from_all_workers(folder: Path) -> None:
    first = 200
    ours, theirs = twins()
    labels = table()[1]
    x, y = own(first, *table())
    tfdist.fit(ours, x, y, class_weight="balanced", shard="local", **ORDERED)
    theirs.fit(*table(), class_weight=tfdist.imbalance.class_weights(labels), **ORDERED)
    assert_weights_close(ours, theirs)


@check(HOROVOD)
def workers_may_weigh_the_same(folder: Path) -> None:
    first = ROWS // 101
    ours, theirs = twins()
    shard = tfdist.LocalShard(weight_by="workers")
    tfdist.fit(ours, *own(first, *table()), shard=shard, **ORDERED)
    weights = np.full(ROWS, ROWS / (2 * (ROWS - first)), "float32")
    weights[:first] = ROWS / (2 * first)
    theirs.fit(*table(), sample_weight=weights, **ORDERED)
    assert_weights_close(ours, theirs)


@check(MULTI_WORKER, full=(HOROVOD,))
def validation_counts_every_row_once(folder: Path) -> None:
    ours, _ = twins()
    for first in (5, 0):
        x, y = own(first, *table())
        history = tfdist.fit(ours, x, y, validation_data=(x, y), shard="local", **ORDERED)
        loss, accuracy = ours.evaluate(*table(), verbose=0)[:2]
        np.testing.assert_allclose(history.history["val_loss"][-1], loss, rtol=1e-4)
        found = tfdist.evaluate(ours, x, y, shard="local", verbose=0)
        np.testing.assert_allclose(found[:2], [loss, accuracy], rtol=1e-4)
    split = tfdist.fit(ours, x, y, validation_split=0.25, shard="local", **ORDERED)
    assert np.isfinite(split.history["val_loss"]).all()


@check(HOROVOD)
def augmentation_and_several_steps(folder: Path) -> None:
    first = ROWS // 101
    augment = tfdist.Augment([keras.layers.GaussianNoise(0.1)], repeated=True)
    model = mlp("sgd", steps_per_execution=4)
    history = tfdist.fit(
        model,
        *own(first, *table()),
        shard="local",
        sampler=tfdist.samplers.Oversample(),
        augment=augment,
        batch_size=64,
        epochs=2,
        verbose=0,
    )
    assert history.history["loss"][1] < history.history["loss"][0]


@check(MULTI_WORKER)
def private_training_is_of_the_union(folder: Path) -> None:
    ours, whole = (private_mlp("sgd") for _ in range(2))
    privacy = tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=0.0, delta=1e-4, seed=4)
    options = {"batch_size": 64, "verbose": 0, "privacy": privacy, "seed": 3}
    for first in (9, 0):
        ours.set_weights(whole.get_weights())
        x, y = own(first, *table())
        a = tfdist.fit(ours, x, y, shard="local", validation_data=(x, y), **options)
        tfdist.fit(whole, *table(), **options)
        assert_weights_close(ours, whole)
        assert a.privacy.ledger.phases[0].sampling_probability == 64 / ROWS


@check(MULTI_WORKER)
def wrong_shards_are_refused(folder: Path) -> None:
    x, y = table(100)
    weighted = tfdist.samplers.Weighted(np.ones(100))
    for arguments, options, message in (
        ((x, y), {"shard": "local", "sampler": weighted}, "sample_weight"),
        ((x[:0], y[:0]), {"shard": "local"}, "At least one worker"),
    ):
        with pytest.raises(ArgumentError, match=message):
            tfdist.fit(mlp("sgd"), *arguments, verbose=0, **options)
