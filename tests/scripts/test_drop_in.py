"""Scripts that know nothing of tfdist: what is led where, and what is left as it was."""

from __future__ import annotations

import gc
import random
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist._keras import datasets
from tfdist.errors import ArgumentError, StrategyError
from tfdist.scripts import drop_in, own_strategies
from tfdist.strategies.base import Place
from tfdist.strategies.session import current
from tfdist.strategies.single import Single
from tfdist.strategies.tf_distribute import adopt
from tfdist.training import routing

pytestmark = pytest.mark.quick
X = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
Y = X[:, :1] * 2


def model(cls: Any = keras.Sequential) -> Any:
    made = cls([keras.Input((4,)), keras.layers.Dense(1)])
    made.compile("sgd", "mse")
    return made


class Doubling(keras.Sequential):
    """Prepares what it is given, as models with a preprocessor do."""

    def fit(self, x: Any = None, y: Any = None, **kwargs: Any) -> Any:
        return super().fit(x=2 * x, y=y, **kwargs)

    def predict(self, x: Any, **kwargs: Any) -> Any:
        return super().predict(2 * x, **kwargs)


@pytest.mark.parametrize("how", ["tfdist", "drop-in"])
def test_an_own_fit_runs_once_and_its_super_is_tfdist_s(how: str) -> None:
    keras.utils.set_random_seed(1)
    plain = model(Doubling)
    expected = plain.fit(X, Y, shuffle=False, verbose=0).history
    predicted = plain.predict(X, verbose=0)
    keras.utils.set_random_seed(1)
    ours = model(Doubling)
    if how == "tfdist":
        history = tfdist.fit(ours, X, Y, shuffle=False, seed=3, verbose=0)
        found = tfdist.predict(ours, X, verbose=0)
    else:
        with tfdist.drop_in():
            history = ours.fit(X, Y, shuffle=False, verbose=0)
            found = ours.predict(X, verbose=0)
    assert history.history == pytest.approx(expected)
    np.testing.assert_allclose(found, predicted, 1e-5)
    assert not routing.is_running()
    assert keras.Model.fit.__module__.startswith("keras")


def test_callbacks_of_an_unmodified_script_call_keras() -> None:
    seen: list[Any] = []

    class Curious(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append(self.model.predict(X, verbose=0).sum())
            seen.append(self.model.evaluate(X, Y, verbose=0))
            other = model()
            seen.append(other.fit(X, Y, shuffle=False, verbose=0).history["loss"][0])

    records = []
    for context in (tfdist.drop_in(), routing.running()):
        keras.utils.set_random_seed(1)
        seen.clear()
        with context:
            model().fit(X, Y, epochs=2, shuffle=False, verbose=0, callbacks=[Curious()])
        records.append(list(seen))
    np.testing.assert_allclose(records[0], records[1], 1e-5)


def test_a_call_in_a_callback_waits_for_no_other_worker() -> None:
    seen: list[str] = []
    routed = drop_in._routed(
        lambda *_, **__: seen.append("tfdist"), lambda *_, **__: seen.append("Keras"), "auto"
    )
    routed(None)
    with routing.running():
        routed(None)
    assert seen == ["tfdist", "Keras"]


def test_a_model_is_not_compiled_while_it_trains() -> None:
    class Unfreezing(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                self.model.compile("adam", "mse")
                self.model.make_train_function()

    trained = model()
    with pytest.raises(ArgumentError, match="must not be compiled while it trains"):
        tfdist.fit(trained, X, Y, epochs=2, verbose=0, callbacks=[Unfreezing()])
    assert not {"make_train_function", "_get_metrics_result_or_logs"} & set(vars(trained))
    trained.compile("adam", "mse")
    trained.fit(X, Y, verbose=0)


def test_fit_leaves_python_s_generator_where_it_is() -> None:
    def seeds(count: int) -> list[int]:
        return [current().sampler_seed(None) for _ in range(count)]

    keras.utils.set_random_seed(1)
    expected = random.random()
    keras.utils.set_random_seed(1)
    first = seeds(3)
    assert len(set(first)) == 3
    assert random.random() == expected
    assert seeds(1)[0] not in first
    keras.utils.set_random_seed(1)  # who seeds again begins again
    assert seeds(3) == first


def order(dataset: Any, count: int = 1) -> list[list[int]]:
    return [[int(x) for x in dataset] for _ in range(count)]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_copy_of_a_dataset_begins_anew(seed: int | None) -> None:
    tf.random.set_seed(1)
    dataset = tf.data.Dataset.range(8).shuffle(8, seed=seed)
    orders = order(dataset, 3)
    assert len(set(map(tuple, orders))) == 3
    assert order(datasets.copy_of(dataset), 3) == orders
    other = order(datasets.copy_of(dataset, 1))
    assert other == order(datasets.copy_of(dataset, 1))
    assert other[0] not in orders


def test_a_second_fit_over_a_repeated_shuffle_does_not_depend_on_buffers() -> None:
    def trained(rests: int) -> list[Any]:
        tf.random.set_seed(1)
        keras.utils.set_random_seed(1)
        rows = tf.data.Dataset.from_tensor_slices((X, Y))
        dataset = rows.shuffle(20).repeat().batch(4).prefetch(50)
        ours = model()
        losses = []
        for _ in range(2):
            history = tfdist.fit(ours, dataset, steps_per_epoch=3, verbose=0)
            losses += history.history["loss"]
            for _ in zip(range(rests), iter(dataset), strict=False):
                pass  # as a buffer that is ahead
        return losses

    assert trained(0) == trained(9)


def test_random_maps_are_made_in_turn() -> None:
    tf.random.set_seed(1)
    rows = tf.data.Dataset.range(50).map(
        lambda x: tf.random.uniform([]) + 0.0 * tf.cast(x, tf.float32), num_parallel_calls=4
    )
    assert datasets.draws_in_parallel(rows) == "RandomUniform"
    first, second = ([float(x) for x in datasets.copy_of(rows)] for _ in range(2))
    assert first == second
    assert datasets.draws_in_parallel(rows.map(lambda x: x, num_parallel_calls=4)) is not None


def test_a_model_leaves_its_scope() -> None:
    scope = tf.distribute.MirroredStrategy(["CPU:0"])
    keras.utils.set_random_seed(1)
    expected = model().fit(X, Y, shuffle=False, verbose=0).history
    keras.utils.set_random_seed(1)
    with scope.scope():
        ours = model()
        history = tfdist.fit(ours, X, Y, shuffle=False, verbose=0)
    assert history.history == pytest.approx(expected)
    for variable in (*ours.variables, *ours.optimizer.variables):
        assert not isinstance(variable._value, tf.distribute.DistributedValues)
    ours.fit(X, Y, verbose=0)  # plain Keras goes on


def test_a_script_gets_the_strategy_that_there_is() -> None:
    before = tf.distribute.MirroredStrategy
    ours = adopt(before(["CPU:0"]))
    undo = own_strategies.claim(ours)
    try:
        assert tf.distribute.MirroredStrategy() is ours.strategy
        assert tf.distribute.experimental.MultiWorkerMirroredStrategy() is ours.strategy
        assert isinstance(ours.strategy, tf.distribute.MirroredStrategy)
        assert issubclass(tf.distribute.MirroredStrategy, tf.distribute.Strategy)
    finally:
        undo()
    assert tf.distribute.MirroredStrategy is before


def test_what_a_script_gets_stays_where_nobody_keeps_the_handle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (tf.distribute, tf.distribute.experimental):
        for name in [name for name in dir(module) if name.endswith("Strategy")]:
            monkeypatch.setattr(module, name, getattr(module, name))  # back at the end
    ours = adopt(tf.distribute.MirroredStrategy(["CPU:0"]))
    own_strategies.claim(ours)
    gc.collect()
    assert tf.distribute.MirroredStrategy() is ours.strategy


def test_where_processes_are_connected_otherwise_loops_are_refused() -> None:
    strategy = Single(None)  # type: ignore[arg-type]
    strategy.place = Place(3, 0, 1, 3, 0)
    undo = own_strategies.claim(strategy)
    try:
        given = tf.distribute.MirroredStrategy()
        assert given.num_replicas_in_sync == 3
        with given.scope():
            model()
        with pytest.raises(StrategyError, match=r"strategy\.run.*model\.fit"):
            given.run(lambda: None)
        with pytest.raises(StrategyError, match="ClusterCoordinator"):
            tf.distribute.coordinator.ClusterCoordinator(given)
    finally:
        undo()
