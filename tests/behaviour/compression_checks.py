"""What compression must do where replicas are; see `checks.py`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tests.behaviour.checkpoint_checks import Stop, StoppedError
from tests.behaviour.checks import (
    ORDERED,
    StopAt,
    assert_weights_close,
    everywhere,
    place,
    same_everywhere,
    twins,
)
from tests.behaviour.registry import HOROVOD, MIRRORED, MULTI_WORKER, SERVERS, check
from tests.compression.test_compression import orthonormal
from tests.equivalence.cases import crossentropy, table
from tfdist import _keras
from tfdist.compression.power_sgd import LowRank
from tfdist.errors import ArgumentError

L = keras.layers
START_AFTER = 2
SETTINGS = tfdist.PowerSGD(rank=1, start_after=START_AFTER, min_ratio=1.5)


class Reference:
    """One process's PowerSGD of a kernel, in NumPy; what it keeps is another's sum."""

    def __init__(self, shape: tuple[int, int], firsts: tuple[Any, Any]) -> None:
        self.residual, self.firsts = np.zeros(shape), firsts
        self.left, self.right = firsts
        self.steps = 0

    def update(self, gradient: Any) -> Any:
        """Gives what is applied in place of a gradient."""
        number, self.steps = self.steps - START_AFTER, self.steps + 1
        if number < 0:
            return gradient
        matrix = gradient + self.residual
        if number % 2 == 0:
            basis = orthonormal(self.left, self.firsts[0])
            self.right = matrix.T @ basis
            applied = basis @ self.right.T
        else:
            basis = orthonormal(self.right, self.firsts[1])
            self.left = matrix @ basis
            applied = self.left @ basis.T
        self.residual = matrix - applied
        return applied


def linear() -> Any:
    """A model whose gradients are a line of NumPy."""
    layers = [keras.Input((20,), dtype="float64"), L.Dense(3, use_bias=False, dtype="float64")]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.25), crossentropy(dtype="float64"))
    model.set_weights([np.random.default_rng(1).normal(size=(20, 3)) / 5])
    return model


def exchange_of(model: Any) -> Any:
    return _keras.attached(model).prepared.exchange


def firsts_of(model: Any) -> Any:
    """The first vectors of both sides, which no training has changed."""
    exchange = LowRank(SETTINGS).make(model, tfdist.strategies.session.current().strategy)
    (factors,) = exchange._factors.values()
    return factors.left.numpy(), factors.right.numpy()


def expected_of(model: Any, x: Any, y: Any, epochs: int) -> tuple[Any, Reference]:
    """Trains in NumPy; gives the weights, and what is known besides."""
    (weights,) = model.get_weights()
    reference = Reference(weights.shape, firsts_of(model))
    for _ in range(epochs):
        for begin in range(0, len(x), 64):
            rows, classes = x[begin : begin + 64], y[begin : begin + 64]
            scores = np.exp(rows @ weights)
            error = scores / scores.sum(1, keepdims=True) - np.eye(3)[classes]
            weights = weights - 0.25 * reference.update(rows.T @ error / len(rows))
    return weights, reference


def residuals(model: Any) -> Any:
    """What all replicas together have not sent."""
    strategy = _keras.attached(model).prepared.strategy
    (factors,) = exchange_of(model)._factors.values()
    own = sum(strategy.copies(factors.residual))
    return sum(everywhere(own))


class Remaining(keras.callbacks.Callback):
    """Adds up residuals while the replicas have theirs."""

    def on_train_end(self, logs: Any = None) -> None:
        self.sum = residuals(self.model)


@check(HOROVOD, full=(MIRRORED, MULTI_WORKER))
def low_rank_training_is_that_of_one_process(folder: Path) -> None:
    model = linear()
    x, y = table(193)  # the last batch has a row, and a replica none
    x = x.astype("float64")
    weights, reference = expected_of(model, x, y, epochs=3)
    remaining = Remaining()
    options = {"compression": SETTINGS, "verify_every": 2, "callbacks": [remaining]}
    tfdist.fit(model, x, y, epochs=3, **ORDERED, **options)
    np.testing.assert_allclose(model.get_weights()[0], weights, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(remaining.sum, reference.residual, rtol=1e-7, atol=1e-9)
    same_everywhere(model)


@check(MULTI_WORKER)
def whole_batches_are_compressed_as_in_one_process(folder: Path) -> None:
    model = linear()
    x, y = table(193)
    x = x.astype("float64")
    weights, _ = expected_of(model, x, y, epochs=1)
    options = {"compression": SETTINGS, "whole_batch": True}
    with pytest.raises(StoppedError):
        tfdist.fit(
            model, x, y, checkpoint=tfdist.Checkpoint(folder / "c", every=1),
            callbacks=[Stop(3)], **ORDERED, **options,
        )  # fmt: skip
    again = linear()
    tfdist.fit(again, x, y, checkpoint=folder / "c", **ORDERED, **options)
    np.testing.assert_allclose(again.get_weights()[0], weights, rtol=1e-9, atol=1e-11)


def compressed(model: Any, *callbacks: Any, **options: Any) -> Any:
    """Trains; gives the state after it, that of all replicas included."""
    remaining = Remaining()
    tfdist.fit(
        model, *table(), epochs=2, compression=SETTINGS, callbacks=[*callbacks, remaining],
        **ORDERED, **options,
    )  # fmt: skip
    return [model.get_weights()[0], remaining.sum]


@check(full=(MIRRORED, MULTI_WORKER))
def a_stopped_low_rank_training_ends_with_the_same_bits(folder: Path) -> None:
    expected = compressed(linear())
    for step, every in ((5, 1), (4, datetime.timedelta(microseconds=1))):
        checkpoint = tfdist.Checkpoint(folder / str(step), every=every)
        with pytest.raises(StoppedError):
            compressed(linear(), Stop(step), checkpoint=checkpoint)
        found = compressed(linear(), checkpoint=checkpoint)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


class Before(keras.callbacks.Callback):
    """Notes what replicas have not sent, after each step."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        (factors,) = exchange_of(self.model)._factors.values()
        self.residual = factors.residual.numpy()
        self.count = int(exchange_of(self.model)._count.numpy())


@check(HOROVOD, full=(MULTI_WORKER,))
def a_step_that_workers_cancel_keeps_nothing(folder: Path) -> None:
    model, before = linear(), Before()
    stop = StopAt(5, place().num_workers - 1)
    tfdist.fit(model, *table(), compression=SETTINGS, callbacks=[before, stop], **ORDERED)
    (factors,) = exchange_of(model)._factors.values()
    assert exchange_of(model)._count.numpy() == before.count == int(model.optimizer.iterations)
    np.testing.assert_array_equal(factors.residual.numpy(), before.residual)
    assert before.residual.any()


@check(MULTI_WORKER, full=(MIRRORED, HOROVOD))
def half_precision_is_close(folder: Path) -> None:
    exact: list[Any] = []
    for compression, tolerance in (("bf16", 4e-2), ("fp16", 5e-3)):
        ours, theirs = twins(lambda: keras.optimizers.SGD(0.1, momentum=0.9))
        history = tfdist.fit(ours, *table(), compression=compression, **ORDERED)
        exact.append(theirs.fit(*table(), **ORDERED).history["accuracy"])
        assert_weights_close(ours, theirs, tolerance)
        pairs = zip(ours.get_weights(), theirs.get_weights(), strict=True)
        assert any((a != b).any() for a, b in pairs)
        # A metric is a sum of whole numbers, which travel as they are.
        right = history.history["accuracy"][-1] * 961
        assert abs(right - round(right)) < 1e-3
        same_everywhere(ours)


@check(HOROVOD)
def a_predivide_factor_keeps_half_precision_finite(folder: Path) -> None:
    """Mean gradients of 40000 on two ranks are 80000 together, more than float16 has."""
    found = []
    for factor in (1.0, float(place().num_replicas)):
        model = keras.Sequential([keras.Input((1,)), L.Dense(1, use_bias=False)])
        model.compile(keras.optimizers.SGD(1e-4), loss=lambda y, p: -40000.0 * p[:, 0])
        model.set_weights([np.zeros((1, 1))])
        strategy = tfdist.Horovod(compression="fp16", gradient_predivide_factor=factor)
        x = np.ones((64, 1), "float32")
        tfdist.fit(model, x, x, strategy=strategy, verify_every=0, **ORDERED)
        found.append(float(model.get_weights()[0][0, 0]))
    assert not np.isfinite(found[0])
    assert found[1] == pytest.approx(4.0, rel=1e-3)


@check(HOROVOD)
def low_rank_is_refused_with_adasum(folder: Path) -> None:
    strategy = tfdist.Horovod(op="adasum")
    with pytest.raises(ArgumentError, match="gradients to be added up"):
        tfdist.fit(linear(), *table(8), strategy=strategy, compression=SETTINGS, **ORDERED)


@check(SERVERS)
def synchronous_servers_sum_in_half_precision(folder: Path) -> None:
    ours, theirs = twins(lambda: keras.optimizers.SGD(0.1, momentum=0.9))
    tfdist.fit(ours, *table(), compression="bf16", **ORDERED)
    theirs.fit(*table(), **ORDERED)
    assert_weights_close(ours, theirs, 4e-2)
    alone = tfdist.ParameterServer(min_part_bytes=256)
    for strategy, compression in (("auto", SETTINGS), (alone, "bf16")):
        with pytest.raises(ArgumentError, match="needs"):
            tfdist.fit(ours, *table(8), strategy=strategy, compression=compression, **ORDERED)
