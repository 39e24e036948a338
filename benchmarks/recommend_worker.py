"""One process of the benchmark of the cost model: predicts steps, or trains and times them.

python benchmarks/recommend_worker.py predict WORKERS HOSTS SERVERS LINK MODEL ...
tfdist run ... benchmarks/recommend_worker.py train STEPS MODEL ...
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import keras

import tfdist
from benchmarks import models
from tfdist.strategies.choice.candidates import Candidate
from tfdist.strategies.choice.recommendation import Recommendation, recommend_for

L = keras.layers
WARM = 8
WORDS, LENGTH = 1000, 32


def wide() -> Any:
    """784-1536-1536-10: 3.6 million weights, 14 MB."""
    layers = [L.Dense(1536, activation="relu") for _ in range(2)]
    return models.compiled(keras.Sequential([keras.Input((784,)), *layers, L.Dense(10)]))


def encoder() -> Any:
    """Two transformer blocks of 64 channels over 32 words."""
    words = keras.Input((LENGTH,), dtype="int32")
    h = L.Embedding(WORDS, 64)(words)
    for _ in range(2):
        h = L.LayerNormalization()(h + L.MultiHeadAttention(4, 16)(h, h))
        h = L.LayerNormalization()(h + L.Dense(64)(L.Dense(256, activation="relu")(h)))
    return models.compiled(keras.Model(words, L.Dense(10)(L.GlobalAveragePooling1D()(h))))


def embedding() -> Any:
    """A table of 20 000 x 64, of which a batch reads at most 1000 rows, and a dense layer."""
    layers = [L.Embedding(20_000, 64), L.GlobalAveragePooling1D(), L.Dense(64, "relu")]
    inputs = keras.Input((LENGTH,), dtype="int32")
    return models.compiled(keras.Sequential([inputs, *layers, L.Dense(10)]))


def lstm() -> Any:
    """An LSTM of 64 units over 32 steps of 16 numbers."""
    return models.compiled(
        keras.Sequential([keras.Input((LENGTH, 16)), L.LSTM(64), L.Dense(10)])
    )


MODELS: dict[str, tuple[Callable[[], Any], int]] = {  # with the batch size
    "small MLP": (models.mlp, 64),
    "wide MLP": (wide, 128),
    "CNN": (lambda: models.cnn(32), 128),
    "encoder": (encoder, 64),
    "embedding": (embedding, 128),
    "LSTM": (lstm, 128),
}


def data(model: Any, rows: int) -> tuple[Any, Any]:
    return models.digits(rows, model.input_shape[1:], model.inputs[0].dtype)


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Notes when steps end."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.ends.append(time.perf_counter())

    @property
    def step_s(self) -> float:
        """The median step after the first ones, which trace."""
        return statistics.median(b - a for a, b in pairwise(self.ends[WARM - 1 :]))


def trained(name: str, steps: int) -> float:
    """Trains one epoch; gives the median seconds of a step."""
    make, batch_size = MODELS[name]
    model, clock = make(), Clock()
    x, y = data(model, (WARM + steps) * batch_size)
    options = {"batch_size": batch_size, "verbose": 0, "callbacks": [clock]}
    tfdist.fit(model, x, y, **options)
    return clock.step_s


def predicted(name: str, workers: int, hosts: int, servers: int, link: str) -> dict[str, Any]:
    """Predicts a training with the links that were measured, and with the usual ones."""
    make, batch_size = MODELS[name]
    model = make()
    x, y = data(model, 40 * batch_size)
    where: dict[str, int] = {"workers": workers, "servers": servers}
    rate = None if link == "-" else link
    found = tfdist.recommend(model, x, y, batch_size, hosts=hosts, link=rate, **where)
    usual = dataclasses.replace(found.hardware, links=())
    return {
        "measured links": _in_numbers(found),
        "usual links": _in_numbers(recommend_for(found.workload, usual, **where)),
    }


def _in_numbers(found: Recommendation) -> dict[str, Any]:
    def parts(c: Candidate) -> tuple[float, float, float]:
        return c.compute_s, c.communication_s, c.input_s

    return {
        "best": None if found.best is None else found.best.strategy,
        "steps": {c.strategy: parts(c) for c in found.candidates if c.step_s},
    }


def main(what: str, *arguments: str) -> None:
    if what == "predict":
        workers, hosts, servers = map(int, arguments[:3])
        link, *names = arguments[3:]
        made = [(name, predicted(name, workers, hosts, servers, link)) for name in names]
        print("measured", made, flush=True)
        return
    steps, *names = arguments
    tfdist.init(seed=1)
    times = [(name, trained(name, int(steps))) for name in names]
    if tfdist.is_chief():
        print("measured", times, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
