"""How data goes on and ends from epoch to epoch: as in plain Keras, for every kind of data."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.data.epochs import count_steps
from tfdist.errors import ArgumentError

N = 5
ROWS = np.arange(1, N + 1, dtype="float32")[:, None]
PLAIN = keras.Model.fit


def dataset(*, shuffled: bool = False) -> Any:
    rows = tf.data.Dataset.from_tensor_slices((ROWS, ROWS))
    return (rows.shuffle(N, seed=3) if shuffled else rows).batch(1)


def of_unknown_length() -> Any:
    return dataset().filter(lambda *_: True)


def generator(batches: int = N) -> Iterator[Any]:
    for row in range(batches):
        yield ROWS[row % N : row % N + 1], ROWS[row % N : row % N + 1]


class Pages(keras.utils.PyDataset):  # type: ignore[misc]
    def __len__(self) -> int:
        return N

    def __getitem__(self, page: int) -> Any:
        return ROWS[page : page + 1], ROWS[page : page + 1]


class Endless(keras.utils.PyDataset):  # type: ignore[misc]
    @property
    def num_batches(self) -> None:
        return None

    def __getitem__(self, page: int) -> Any:
        row = np.array([[page + 1]], "float32")
        return row, row


KINDS: dict[str, Callable[[], Any]] = {
    "arrays": lambda: ROWS,
    "dataset": dataset,
    "shuffled": lambda: dataset(shuffled=True),
    "shuffled, repeated": lambda: dataset(shuffled=True).repeat(),
    "unknown length": of_unknown_length,
    "PyDataset": Pages,
    "endless PyDataset": Endless,
    "generator": generator,
    "long generator": lambda: generator(40),
}
# Steps that pass over the data differently: all of it, parts that do not divide it, exactly it,
# and more than it. A shuffled data set shows which iterator it is at, so it stands for a plain
# one; what counts its batches alike need not show all of that again.
TRAINED = [
    *[("shuffled", steps) for steps in (None, 3, N, N + 2)],
    *[("unknown length", steps) for steps in (None, 3, N, N + 2)],
    *[("arrays", steps) for steps in (None, 3)],
    *[("PyDataset", steps) for steps in (3, N + 2)],
    *[(kind, 3) for kind in ("shuffled, repeated", "endless PyDataset", "long generator")],
]
VALIDATED = [
    *[("shuffled", steps) for steps in (None, 3, N, N + 2)],
    *[("unknown length", steps) for steps in (None, 3, N + 2)],
    *[(kind, 3) for kind in ("arrays", "PyDataset", "shuffled, repeated", "endless PyDataset")],
]
AT_ONCE = [
    *[("dataset", None, 2), ("dataset", 4, 3), ("arrays", 3, 2), ("PyDataset", 4, 3)],
    *[("unknown length", 3, 2), ("unknown length", N + 2, 4)],
]


@functools.cache
def counting(fit: Callable[..., Any], steps_per_execution: int) -> Any:
    """Makes a model for `seen`; one that was traced serves all data of a kind."""
    layer = keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(
        keras.optimizers.SGD(1.0), lambda y, p: -p, steps_per_execution=steps_per_execution
    )
    return model


def seen(fit: Callable[..., Any], data: Any, *more: Any, **options: Any) -> dict[str, Any]:
    """Trains a weight by 1 times the row: each step tells which row it saw.

    Returns:
        The rows of each epoch of each `fit`, its history, and how often data ran out.
    """
    model = counting(fit, options.pop("steps_per_execution", 1))
    model.set_weights([np.zeros([1, 1])])
    model.optimizer.iterations.assign(0)
    rows: list[list[float]] = []
    last = 0.0

    def begin(epoch: int, logs: Any) -> None:
        rows.append([])

    def note(batch: int, logs: Any) -> None:
        nonlocal last
        weight = float(model.get_weights()[0][0, 0])
        rows[-1].append(round(weight - last, 3))
        last = weight

    look = keras.callbacks.LambdaCallback(on_epoch_begin=begin, on_train_batch_end=note)
    y = [data] if isinstance(data, np.ndarray) else []
    if y:
        options |= {"batch_size": 1, "validation_batch_size": 1}
    options = {"shuffle": False, "verbose": 0, "callbacks": [look], **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        histories = [fit(model, data, *y, **options).history for _ in range(1 + len(more))]
    ran_out = sum("ran out of data" in str(one.message) for one in caught)
    return {"rows": rows, "histories": histories, "ran out": ran_out}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["rows"] == theirs["rows"]
    assert ours["ran out"] == theirs["ran out"]
    for found, expected in zip(ours["histories"], theirs["histories"], strict=True):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            for value, wanted, rows in zip(found[name], values, theirs["rows"], strict=False):
                if rows or name != "loss":
                    assert value == pytest.approx(wanted, rel=1e-5), name
                else:  # Keras says 0.0 of an epoch without a step
                    assert math.isnan(value)


@pytest.mark.parametrize(("kind", "steps"), TRAINED)
def test_epochs_are_those_of_keras(kind: str, steps: int | None) -> None:
    options = {"epochs": 4, "steps_per_epoch": steps}
    ours = seen(tfdist.fit, KINDS[kind](), **options)
    assert_same(ours, seen(PLAIN, KINDS[kind](), **options))


@pytest.mark.parametrize(("kind", "steps"), VALIDATED)
def test_validation_goes_on_as_in_keras(kind: str, steps: int | None) -> None:
    histories = []
    for fit in (tfdist.fit, PLAIN):
        data = KINDS[kind]()
        validation = (data, data) if isinstance(data, np.ndarray) else data
        options = {"epochs": 3, "validation_data": validation, "validation_steps": steps}
        histories += seen(fit, ROWS, **options)["histories"]
    ours, theirs = (history["val_loss"] for history in histories)
    for value, expected in zip(ours, theirs, strict=True):
        is_none = expected == 0.0  # of no step: no weight is 0 by then
        assert math.isnan(value) if is_none else value == pytest.approx(expected, rel=1e-5)


def test_validation_begins_with_the_two_batches_that_keras_looks_at() -> None:
    options = {"epochs": 3, "validation_data": generator(40), "validation_steps": 3}
    (history,) = seen(tfdist.fit, ROWS, **options)["histories"]
    weights = [np.arange(1, N + 1).sum() * epoch for epoch in (1, 2, 3)]
    batches = ROWS[np.array([[0, 1, 2], [0, 1, 3], [0, 1, 4]]) % N, 0]
    expected = [-(rows * w).mean() for rows, w in zip(batches, weights, strict=True)]
    assert history["val_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("steps", [None, 3])
def test_a_second_fit_shuffles_as_in_keras(steps: int | None) -> None:
    ours, theirs = (
        seen(fit, dataset(shuffled=True), "again", epochs=2, steps_per_epoch=steps)
        for fit in (tfdist.fit, PLAIN)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize(("kind", "steps", "at_once"), AT_ONCE)
def test_several_steps_at_once(kind: str, steps: int | None, at_once: int) -> None:
    options = {"epochs": 4, "steps_per_epoch": steps, "steps_per_execution": at_once}
    ours, theirs = (
        [sum(rows) for rows in seen(fit, KINDS[kind](), **options)["rows"]]
        for fit in (tfdist.fit, PLAIN)
    )
    assert ours == theirs
    made = int(counting(PLAIN, at_once).optimizer.iterations)
    batches = None if kind == "unknown length" else N
    planned = count_steps(steps, batches, epochs=4, at_once=at_once)
    assert planned == made if batches else planned >= made


@pytest.mark.parametrize(
    ("steps", "rows"),
    [
        (None, [[1, 2, 3, 4, 5]]),
        (2, [[1, 2], [3, 4], [5]]),
        (N, [[1, 2, 3, 4, 5], []]),
    ],
)
def test_training_ends_with_its_generator(steps: int | None, rows: list[list[int]]) -> None:
    # Keras gives the first two batches again, which it drew to see their shape.
    ours = seen(tfdist.fit, generator(), epochs=6, steps_per_epoch=steps)
    assert ours["rows"] == rows
    assert ours["ran out"] == 1
    (history,) = ours["histories"]
    assert [math.isnan(loss) for loss in history["loss"]] == [not epoch for epoch in rows]


def test_an_epoch_without_a_step_is_no_improvement() -> None:
    stop = keras.callbacks.EarlyStopping("loss", patience=1, mode="min", min_delta=-1e9)
    layer = keras.layers.Dense(1, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((1,)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    best = keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: losses.append(logs))
    losses: list[Any] = []
    options = {"epochs": 4, "steps_per_epoch": N, "verbose": 0, "callbacks": [best, stop]}
    tfdist.fit(model, of_unknown_length(), **options)
    assert [math.isnan(logs["loss"]) for logs in losses] == [False, True, False, True][
        : len(losses)
    ]


ENDLESS_CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "fit": lambda model, data: tfdist.fit(model, data, verbose=0),
    "validation": lambda model, data: tfdist.fit(model, ROWS, ROWS, validation_data=data),
    "evaluate": lambda model, data: tfdist.evaluate(model, data, verbose=0),
    "predict": lambda model, data: tfdist.predict(model, data.map(lambda x, y: x), verbose=0),
}


@pytest.mark.parametrize("call", ENDLESS_CALLS)
def test_data_without_an_end_needs_steps(call: str) -> None:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ArgumentError, match=r"needs the number of batches.*steps"):
        ENDLESS_CALLS[call](model, dataset().repeat())
