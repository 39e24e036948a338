"""What federated training must do where replicas are, against a plain loop over clients."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tests.behaviour.checkpoint_checks import Stop, StoppedError
from tests.behaviour.checks import (
    assert_weights_close,
    everywhere,
    place,
    same_everywhere,
)
from tests.behaviour.registry import HOROVOD, MIRRORED, MULTI_WORKER, check
from tests.federated.reference import (
    clipped_by_example,
    federated_averaging,
    in_float64,
    model_of,
    rows_drawn,
    rows_of,
)
from tfdist.federated import clients as of
from tfdist.federated import masks
from tfdist.strategies.base import Place

SIZES = (40, 7, 70, 1, 33, 20)
PARTS = rows_of(*SIZES)
X, Y = (np.concatenate(arrays) for arrays in zip(*PARTS, strict=True))
IDS = np.repeat(range(len(SIZES)), SIZES)
OPTIONS: dict[str, Any] = {"batch_size": 16, "shuffle": False, "seed": 5, "verbose": 0}


def momentum() -> Any:
    return keras.optimizers.SGD(0.1, momentum=0.9)


@check(MIRRORED, full=(MULTI_WORKER, HOROVOD))
def simulated_clients_are_those_of_one_process(folder: Path) -> None:
    """More clients than replicas, all of what they keep, drawn for each round."""
    settings = {"local_steps": 3, "proximal": 0.3, "keep_optimizer": True}
    with in_float64():
        averaging = tfdist.FedAvg(
            clients=IDS, clients_per_round=4, server_optimizer=keras.optimizers.Adam(0.1),
            **settings,
        )  # fmt: skip
        ours, theirs = (model_of(momentum(), norm=True, dropout=0.4) for _ in range(2))
        history = tfdist.fit(
            ours, X, Y, epochs=4, federated=averaging, validation_data=(X, Y), **OPTIONS
        )
        clients = of.of_ids(IDS, len(IDS), tfdist.strategies.session.current().strategy, False)
        plan = tfdist.federated.plan.RoundPlan(
            averaging, clients, Place(), tfdist.samplers.Sequential(), 16, 5
        )
        drawn = [plan.chosen(number).tolist() for number in range(4)]
        losses = federated_averaging(
            theirs, PARTS, 4, optimizer=momentum, batch_size=16, local_steps=3, proximal=0.3,
            keeps=True, server=keras.optimizers.Adam(0.1), chosen=drawn.__getitem__,
        )  # fmt: skip
        expected = theirs.evaluate(X, Y, verbose=0)[0]
    assert len({tuple(d) for d in drawn}) > 1
    assert_weights_close(ours, theirs, 1e-12)
    np.testing.assert_allclose(history.history["loss"], losses, rtol=1e-12)
    np.testing.assert_allclose(history.history["val_loss"][-1], expected, rtol=1e-12)
    same_everywhere(ours)


def each_is_a_client(first: int) -> None:
    """Trains where the first worker has so many rows, and the second one the rest."""
    with in_float64():
        ours, theirs = (model_of(momentum()) for _ in range(2))
        cuts = slice(0, first), slice(first, None)
        own = cuts[place().worker_index]
        averaging = tfdist.FedAvg(local_epochs=2)
        options = {**OPTIONS, "epochs": 2, "shard": "local", "federated": averaging}
        history = tfdist.fit(ours, X[own], Y[own], **options)
        parts = [(X[cut], Y[cut]) for cut in cuts]
        steps = [2 * -(-len(x) // 16) for x, _ in parts]
        losses = federated_averaging(
            theirs, parts, 2, optimizer=momentum, batch_size=16, local_steps=steps
        )
        assert_weights_close(ours, theirs, 1e-12)
        np.testing.assert_allclose(history.history["loss"], losses, rtol=1e-12)
        same_everywhere(ours)


@check(HOROVOD)
def each_worker_is_a_client(folder: Path) -> None:
    each_is_a_client(101)


@check(MULTI_WORKER)
def a_worker_without_rows_trains_nobody(folder: Path) -> None:
    each_is_a_client(len(X))


@check(MULTI_WORKER)
def clients_stay_on_the_worker_that_has_their_rows(folder: Path) -> None:
    with in_float64():
        ours, theirs = (model_of(momentum()) for _ in range(2))
        own = (IDS < 4) == (place().worker_index == 0)
        averaging = tfdist.FedAvg(local_steps=2, clients=IDS[own], keep_optimizer=True)
        options = {**OPTIONS, "epochs": 2, "shard": "local"}
        tfdist.fit(ours, X[own], Y[own], federated=averaging, **options)
        federated_averaging(
            theirs, PARTS, 2, optimizer=momentum, batch_size=16, local_steps=2, keeps=True
        )
        assert_weights_close(ours, theirs, 1e-12)


@check(MIRRORED)
def one_step_of_all_clients_is_a_step_of_all_rows(folder: Path) -> None:
    """Each replica is a client; then SGD on the server is SGD on all rows."""
    with in_float64():
        ours = model_of(keras.optimizers.SGD(0.2))
        theirs = model_of(keras.optimizers.SGD(0.2, momentum=0.9))
        averaging = tfdist.FedAvg(
            local_steps=1, server_optimizer=keras.optimizers.SGD(1.0, momentum=0.9)
        )
        options = {"batch_size": len(X), "epochs": 3, "verbose": 0}
        a = tfdist.fit(ours, X, Y, federated=averaging, seed=1, **options)
        b = theirs.fit(X, Y, **options)
        assert_weights_close(ours, theirs, 1e-12)
        for name in b.history:
            np.testing.assert_allclose(a.history[name], b.history[name], rtol=1e-12)


@check(full=(MIRRORED,))
def a_stopped_federated_training_ends_with_the_same_bits(folder: Path) -> None:
    """On one replica, which then keeps the optimizers of all clients, up to float order."""

    def trained(*callbacks: Any, **options: Any) -> Any:
        model = model_of(keras.optimizers.Adam(0.05), norm=True, dropout=0.4)
        averaging = tfdist.DiLoCo(local_steps=3, clients=IDS, clients_per_round=3)
        options |= {**OPTIONS, "epochs": 5, "callbacks": list(callbacks)}
        tfdist.fit(model, X, Y, federated=averaging, **options)
        return [*model.get_weights(), int(model.optimizer.iterations)]

    with in_float64():
        expected = trained()
        with pytest.raises(StoppedError):
            trained(Stop(3), checkpoint=folder / "c")
        shutil.copytree(folder / "c", folder / "alone")
        again = trained(checkpoint=folder / "c")
        alone = trained(checkpoint=folder / "alone", strategy="single")
    for ours, of_one, theirs in zip(again, alone, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(of_one, theirs, rtol=1e-11, atol=1e-12)


@check(full=(MULTI_WORKER,))
def updates_travel_compressed(folder: Path) -> None:
    models = []
    for compression in (None, "bf16", tfdist.PowerSGD(rank=3, start_after=1, min_ratio=1.0)):
        model = model_of(keras.optimizers.Adam(0.05))
        averaging = tfdist.FedAvg(local_steps=2, clients=IDS)
        options = {"epochs": 3, "compression": compression, "federated": averaging}
        tfdist.fit(model, X, Y, **options, **OPTIONS)
        same_everywhere(model)
        models.append(model)
    plain, half, low_rank = models
    assert_weights_close(half, plain, 2e-2)
    for model in (half, low_rank):
        pairs = zip(model.get_weights(), plain.get_weights(), strict=True)
        assert any((a != b).any() for a, b in pairs)


CUTS = slice(0, 47), slice(47, 118), slice(118, None)


def trained_by_three(settings: Any) -> tuple[Any, Any]:
    """Trains where three workers have their own rows; gives the model and the history."""
    own = CUTS[place().worker_index]
    model = model_of(momentum(), norm=True, dropout=0.4)
    averaging = tfdist.FedAvg(local_epochs=1, secure=settings)
    options = {**OPTIONS, "epochs": 2, "shard": "local", "federated": averaging}
    history = tfdist.fit(model, X[own], Y[own], **options)
    same_everywhere(model)
    return model, history.history


@check("multi_worker-3", full=("horovod-3",))
def secure_sums_are_those_of_plain_whole_numbers(folder: Path) -> None:
    """Bit by bit, of what each worker had before it masked; and nothing else is sent."""
    strategy, types, seen = tfdist.strategies.session.current().strategy, set(), []
    reduce_step, add_masks = strategy.reduce_step, masks.PairwiseMasks.add_to

    def recorded_types(gradients: Any, exact_tensors: Any, *rest: Any) -> Any:
        types.add((len(gradients), *(tensor.dtype.name for tensor in exact_tensors)))
        return reduce_step(gradients, exact_tensors, *rest)

    def recorded(self: Any, number: int, lane: int, vectors: Any) -> Any:
        masked = add_masks(self, number, lane, vectors)
        assert all(np.mean(m == v) < 0.01 for m, v in zip(masked, vectors, strict=True))
        seen.append((number, vectors[0].copy()))
        return masked

    with in_float64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "reduce_step", recorded_types)
        patch.setattr(masks.PairwiseMasks, "add_to", recorded)
        first = model_of(momentum(), norm=True, dropout=0.4)
        ours, history = trained_by_three(tfdist.SecureSum())
        theirs = model_of(momentum(), norm=True, dropout=0.4)
        parts = [(X[cut], Y[cut]) for cut in CUTS]
        losses = federated_averaging(theirs, parts, 2, optimizer=momentum, batch_size=16)
    assert types == {(0, "int64", "int64", "float32")}  # the last one has signals
    assert [number for number, _ in seen] == [0, 1]
    order = [(m.trainable_variables, statistics_of(m)) for m in (first, ours)]
    expected, found = (np.concatenate([v.numpy().ravel() for v in a + b]) for a, b in order)
    for rounds in zip(*everywhere(seen), strict=True):
        expected = expected - np.sum([sent for _, sent in rounds], 0) * 2.0**-32
    np.testing.assert_array_equal(found, expected)
    assert_weights_close(ours, theirs, 1e-8)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-7)
    assert history["secure_sum_clipped"] == [0.0, 0.0]


def statistics_of(model: Any) -> list[Any]:
    return [v for v in model.non_trainable_variables if "seed" not in v.name]


@check(full=("multi_worker-3",))
def clipped_values_of_secure_sums_are_reported(folder: Path) -> None:
    with in_float64():
        _, history = trained_by_three(tfdist.SecureSum(bits=32, max_value=1e-3))
    assert 0 < history["secure_sum_clipped"][0] < 1


@check(MIRRORED, full=(MULTI_WORKER, HOROVOD))
def clients_are_protected_as_on_one_process(folder: Path) -> None:
    """Without noise the weights, and an adaptive norm, are those of a loop."""
    privacy = tfdist.ClientDP(
        0.02, noise_multiplier=0.0, delta=1e-2, sampling_probability=0.7,
        target_quantile=0.7, clip_learning_rate=0.9,
    )  # fmt: skip
    norms: list[float] = []
    with in_float64():
        averaging = tfdist.FedAvg(
            clients=IDS, local_steps=2, weighting="uniform", privacy=privacy
        )
        ours, theirs = (model_of(momentum()) for _ in range(2))
        history = tfdist.fit(ours, X, Y, epochs=3, federated=averaging, **OPTIONS)
        clients = of.of_ids(IDS, len(IDS), tfdist.strategies.session.current().strategy, False)
        plan = tfdist.federated.plan.RoundPlan(
            averaging, clients, Place(), tfdist.samplers.Sequential(), 16, 5
        )
        drawn = [plan.chosen(number).tolist() for number in range(3)]
        federated_averaging(
            theirs, PARTS, 3, optimizer=momentum, batch_size=16, local_steps=2,
            chosen=drawn.__getitem__, clip=(0.02, 0.7 * 6), quantile=(0.7, 0.9), norms=norms,
        )  # fmt: skip
        assert_weights_close(ours, theirs, 2e-6)
    np.testing.assert_allclose(history.history["l2_norm_clip"], norms, rtol=1e-5)


@check(MIRRORED, full=(MULTI_WORKER, HOROVOD))
def noise_on_the_sum_over_clients_is_added_once(folder: Path) -> None:
    """Not by each replica. Of 30000 numbers the deviation is known within 2 %."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5000, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    before = model.get_weights()[0]
    noisy = tfdist.ClientDP(0.7, noise_multiplier=1.5, delta=1e-2, sampling_probability=0.5)
    averaging = tfdist.FedAvg(clients=IDS, local_steps=2, weighting="uniform", privacy=noisy)
    report = tfdist.fit(
        model, X, np.zeros((len(X), 5000)), epochs=1, verbose=0, federated=averaging
    ).privacy
    same_everywhere(model)
    moved = (model.get_weights()[0] - before) * (0.5 * 6) / (1.5 * 0.7)
    assert moved.std() == pytest.approx(1.0, rel=0.02)
    assert report.secret
    assert report.ledger.steps == 1


@check(MIRRORED, full=(MULTI_WORKER, HOROVOD))
def examples_are_protected_by_each_client(folder: Path) -> None:
    """Without noise as in a loop; with noise, each client adds all of it, on any replica."""
    privacy = tfdist.DPSGD(0.2, noise_multiplier=0.0, delta=1e-3)
    averaging = tfdist.FedAvg(local_steps=2, clients=IDS, proximal=0.5, privacy=privacy)
    with in_float64():
        ours, theirs = (model_of(keras.optimizers.SGD(0.3)) for _ in range(2))
        tfdist.fit(ours, X, Y, epochs=2, federated=averaging, **OPTIONS)
        clipped_by_example(
            theirs, PARTS, 2, drawn=rows_drawn(averaging, IDS, SIZES, 5), clip=0.2,
            batch_size=16, proximal=0.5,
        )  # fmt: skip
        assert_weights_close(ours, theirs, 5e-6)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5000, use_bias=False)])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    before = model.get_weights()[0]
    noisy = tfdist.DPSGD(0.7, noise_multiplier=1.5, delta=1e-3)
    averaging = tfdist.FedAvg(local_steps=2, clients=IDS, weighting="uniform", privacy=noisy)
    x, y = np.zeros((len(X), 6)), np.zeros((len(X), 5000))
    report = tfdist.fit(model, x, y, batch_size=4, verbose=0, federated=averaging).privacy
    same_everywhere(model)
    moved = (model.get_weights()[0] - before) / (1.5 * 0.7 / 4 * (2 / 6) ** 0.5)
    assert moved.std() == pytest.approx(1.0, rel=0.02)
    assert report.secret
    assert [(p.part, p.steps) for p in report.ledger.phases] == [(n, 2) for n in range(6)]


@check(full=(MULTI_WORKER, HOROVOD))
def workers_draw_noise_that_others_do_not_know(folder: Path) -> None:
    """The mean of two workers has noise of both, each with a stream of its own."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5000, use_bias=False)])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    before = model.get_weights()[0]
    noisy = tfdist.DPSGD(0.7, noise_multiplier=1.5, delta=1e-3)
    x = np.zeros((10, 6))
    report = tfdist.fit(
        model, x, np.zeros((10, 5000)), batch_size=4, epochs=1, verbose=0, shard="local",
        federated=tfdist.FedAvg(local_steps=2, privacy=noisy),
    ).privacy  # fmt: skip
    same_everywhere(model)
    workers = place().num_workers
    moved = (model.get_weights()[0] - before) / (1.5 * 0.7 / 4 * (2 / workers) ** 0.5)
    assert moved.std() == pytest.approx(1.0, rel=0.02)
    assert report.secret
    assert report.ledger.parts == tuple(range(workers))
