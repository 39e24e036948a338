"""Arguments that must be refused, each with a message that names it; no process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tests.equivalence.cases import clipped_sgd, mlp, table
from tfdist.errors import ArgumentError, DisagreementError
from tfdist.strategies.base import Place, Strategy
from tfdist.training import preflight

pytestmark = pytest.mark.quick
X, Y = table(10)


def batches() -> Any:
    return tf.data.Dataset.from_tensor_slices(table(4)).batch(2)


@pytest.fixture(scope="module")
def model() -> Any:
    return mlp(clipped_sgd())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x": X, "y": Y, "batch_size": 0}, ["batch_size=0"]),
        ({"x": X, "y": Y, "batch_size": 2.5}, ["batch_size=2.5"]),
        ({"x": X, "y": Y, "epochs": -1}, ["epochs=-1"]),
        ({"x": X, "y": Y, "steps_per_epoch": 0}, ["steps_per_epoch=0"]),
        ({"x": X, "y": Y, "verify_every": -1}, ["verify_every=-1"]),
        ({"x": X[:0], "y": Y[:0]}, ["at least one example"]),
        ({"x": X, "y": Y[:9]}, ["[10]", "[9]"]),
        ({"x": X, "y": Y, "validation_split": 1.0}, ["validation_split=1.0"]),
        ({"x": X, "y": Y, "class_weight": {0: 1}, "sample_weight": Y}, ["class_weight"]),
        ({"x": "nothing"}, ["x='nothing'"]),
        ({"x": batches().take(0)}, ["at least one batch"]),
        ({"x": batches().filter(lambda *_: False)}, ["at least one batch"]),
        ({"x": batches(), "y": Y}, ["`y`"]),
        ({"x": X, "y": Y, "strategy": "dtensor"}, ["strategy='dtensor'", "mirrored"]),
        ({"x": X, "y": Y, "shard": "global"}, ["'local'"]),
        ({"x": batches(), "shard": "local"}, ["needs arrays"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_fit_is_refused(arguments: dict[str, Any], said: list[str], model: Any) -> None:
    before = model.get_weights()
    with pytest.raises(ArgumentError) as caught:
        tfdist.fit(model, verbose=0, **arguments)
    for words in said:
        assert words in str(caught.value)
    assert int(model.optimizer.iterations) == 0
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_size_beside_batches_is_ignored_as_keras_does() -> None:
    model = mlp("sgd")
    with pytest.warns(UserWarning, match="batch_size=4 is ignored"):
        tfdist.fit(model, batches(), batch_size=4, verbose=0)
    assert int(model.optimizer.iterations) == 2


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1, 2, 3], "x=[1, 2, 3], a list of numbers. Pass np.array(x)"),
        ([["a"], ["b"]], "a list of texts"),
        ("data.csv", "x='data.csv', a path"),
        (Path("data.csv"), "a path"),
        ([X, 3], "which holds 3 (of type int)"),
        (iter([X]), "(of type list_iterator)"),
        (batches().unbatch(), "shapes (20,), (). Call .batch(batch_size)"),
    ],
)
def test_what_holds_no_rows_is_named(x: Any, message: str, model: Any) -> None:
    y = None if isinstance(x, tf.data.Dataset) else Y
    for call in (
        lambda: tfdist.fit(model, x, y),
        lambda: tfdist.fit(model, X, Y, validation_data=x if y is None else (x, y)),
        lambda: tfdist.evaluate(model, x, y),
        lambda: tfdist.predict(model, x),
    ):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert message in str(caught.value)


def test_a_refusal_shows_the_users_lines_alone(model: Any) -> None:
    def of_the_user(example: Any) -> Any:
        return tfdist.predict(model, example)

    class Callback(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            of_the_user("nothing")

    with pytest.raises(ArgumentError) as caught:
        tfdist.fit(model, X, Y, callbacks=[Callback()], verbose=0)
    own = [entry.name for entry in caught.traceback if str(entry.path) == __file__]
    assert own[1:] == ["on_train_begin", "of_the_user"]
    ours = str(Path(tfdist.__file__).parent)
    assert sum(str(entry.path).startswith(ours) for entry in caught.traceback) <= 2


class Workers(Strategy):
    """Two workers, of which the other one sends something else."""

    place = Place(2, 0, 1, 2, 0)
    sent: Any = None

    @classmethod
    def unavailable(cls, cluster: Any) -> None:
        pass

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.sent]


def test_a_call_of_the_chief_alone_is_named(model: Any, tmp_path: Path) -> None:
    workers = Workers.__new__(Workers)

    class Best(keras.callbacks.ModelCheckpoint):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            preflight.check_call(workers, "evaluate")

    best = Best(str(tmp_path / "best.keras"))
    with pytest.raises(DisagreementError, match="from the callback Best, which only the chief"):
        model.fit(X, Y, callbacks=[best], verbose=0)
    workers.sent = "evaluate"
    best.on_epoch_end(0)  # by hand, maybe on all workers
    for sent, message in ((np.ones(3), "worker 1: another exchange"), ("fit", "1: `fit`")):
        workers.sent = sent
        with pytest.raises(DisagreementError, match=message):
            preflight.check_call(workers, "evaluate")


def test_a_list_of_targets_is_named(model: Any) -> None:
    with pytest.raises(ArgumentError, match=r"a list of numbers. Pass np.array\(y\)"):
        tfdist.fit(model, X, [0] * len(X))


def test_what_an_own_method_may_use_need_not_look_like_batches() -> None:
    class Own(keras.Sequential):
        """Its `train_step` may draw its own examples, and take numbers of steps as `x`."""

    numbers = tf.data.Dataset.range(5)
    layers = [keras.Input((20,)), keras.layers.Dense(1)]
    preflight.check_batched(Own(layers), numbers, numbers.element_spec)
    with pytest.raises(ArgumentError, match=r"Call \.batch\("):
        preflight.check_batched(keras.Sequential(layers), numbers, numbers.element_spec)
    columns = tf.data.Dataset.from_tensors(X[:, 0])  # to which Keras adds a dimension
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    preflight.check_batched(model, columns, columns.element_spec)


def test_an_uncompiled_model_is_refused() -> None:
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(3)])
    with pytest.raises(ArgumentError, match="compile"):
        tfdist.fit(model, X, Y)
    with pytest.raises(ArgumentError, match="function"):
        tfdist.fit(lambda: 3, X, Y)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"op": "sum"}, "op='sum'"),
        ({"compression": "fp8"}, "'fp8'"),
        ({"gradient_predivide_factor": 0.0}, "gradient_predivide_factor=0.0"),
        ({"op": "adasum", "gradient_predivide_factor": 2.0}, "gradient_predivide_factor=2.0"),
    ],
)
def test_settings_of_horovod_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        tfdist.Horovod(**options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_staleness": -1},
        {"max_staleness": 1, "synchronous": True},
        {"data": "servers"},
        {"data": "workers", "synchronous": True},
        {"min_part_bytes": 0},
    ],
)
def test_settings_of_parameter_servers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as caught:
        tfdist.ParameterServer(**options)
    received = str(caught.value).partition("Received: ")[2]
    for name, value in options.items():
        assert f"{name}={value!r}" in received
