"""One worker of the benchmark of compression, and its models.

tfdist run -n 2 benchmarks/compression_worker.py steps MODEL NUMBER COMPRESSION ...
python benchmarks/compression_worker.py accuracy TASK SEEDS
python benchmarks/compression_worker.py alone MODEL NUMBER COMPRESSION ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tfdist
from benchmarks import links, models

L = keras.layers
WARM, BATCH = 4, 64
WORDS, LENGTH, WIDTH = 1000, 16, 64
COMPRESSIONS = ("none", "bf16", "PowerSGD 1", "PowerSGD 2", "PowerSGD 4")


def compression_of(name: str, start_after: int = 0) -> Any:
    """Gives what `fit` takes."""
    kind, _, rank = name.partition(" ")
    if kind == "PowerSGD":
        return tfdist.PowerSGD(rank=int(rank), start_after=start_after)
    return None if name == "none" else name


def perceptron() -> Any:
    """For digits: 64-256-256-10."""
    layers = [L.Dense(256, activation="relu") for _ in range(2)]
    return models.compiled(keras.Sequential([keras.Input((64,)), *layers, L.Dense(10)]))


def transformer() -> Any:
    """A table of 1000 words and a block of 64 channels."""
    words = keras.Input((LENGTH,), dtype="int32")
    h = L.Embedding(WORDS, WIDTH)(words)
    h = L.LayerNormalization()(h + L.MultiHeadAttention(4, WIDTH // 4)(h, h))
    h = L.LayerNormalization()(h + L.Dense(WIDTH)(L.Dense(4 * WIDTH, activation="relu")(h)))
    return models.compiled(keras.Model(words, L.Dense(4)(L.GlobalAveragePooling1D()(h))))


def large() -> Any:
    """10 million weights, with SGD: Adam's own time hides nothing."""
    layers = [L.Dense(2048, activation="relu") for _ in range(3)]
    model = models.compiled(keras.Sequential([keras.Input((784,)), *layers, L.Dense(10)]))
    model.compile("sgd", model.loss)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "digits": perceptron,
    "words": transformer,
    "cnn": models.cnn,
    "large": large,
}


def digits(seed: int) -> Any:
    x, y = load_digits(return_X_y=True)
    return train_test_split(
        (x / 16).astype("float32"), y, test_size=0.25, stratify=y, random_state=seed
    )


def words(seed: int) -> Any:
    """Sequences of which each word is of one of four groups; the largest is the class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, 6000)
    x = rng.integers(0, WORDS, (6000, LENGTH))
    is_of_class = rng.random(x.shape) < 0.3
    x = np.where(is_of_class, x // 4 * 4 + y[:, None], x).astype("int32")
    return x[:4000], x[4000:], y[:4000], y[4000:]


TASKS: dict[str, tuple[Callable[[int], Any], int]] = {
    "digits": (digits, 20),
    "words": (words, 4),
}


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """Notes times and what was sent, after the first steps and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.notes = 0, []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.made += 1
        if self.made == WARM:
            self.note()

    def on_train_end(self, logs: Any = None) -> None:
        self.note()

    def note(self) -> None:
        self.notes.append((time.perf_counter(), links.bytes_sent(), time.process_time()))


def step(make: Callable[[], Any], number: int, name: str, strategy: Any = "auto") -> Any:
    """Trains a model; gives seconds and bytes sent of a step, and its processor seconds."""
    model = make()
    shape, dtype = model.input_shape[1:], model.inputs[0].dtype
    x, y = models.digits((WARM + number) * BATCH, shape, dtype)
    y = y % model.output_shape[-1]
    clock = Clock()
    tfdist.fit(
        model,
        x,
        y,
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[clock],
        strategy=strategy,
        compression=compression_of(name),
        verify_every=0,
    )
    seconds, sent, busy = ((b - a) / number for a, b in zip(*clock.notes, strict=True))
    return name, seconds, sent, busy


def accuracies(task: str, seeds: int) -> Any:
    """Gives the accuracies on held-out data of each compression, on two replicas."""
    data, epochs = TASKS[task]
    found: dict[str, list[float]] = {name: [] for name in COMPRESSIONS}
    for seed in range(seeds):
        x, x_test, y, y_test = data(seed)
        for name, scores in found.items():
            keras.utils.set_random_seed(seed)
            model = MODELS[task]()
            options = {"batch_size": BATCH, "epochs": epochs, "verbose": 0, "seed": seed}
            tfdist.fit(
                model,
                x,
                y,
                strategy="mirrored",
                compression=compression_of(name, start_after=20),
                **options,
            )
            result = tfdist.evaluate(
                model, x_test, y_test, verbose=0, return_dict=True, strategy="single"
            )
            scores.append(float(result["accuracy"]))
    return list(found.items())


def main(what: str, model: str, number: str, *names: str) -> None:
    if what == "accuracy":
        device = tf.config.list_physical_devices("CPU")[0]
        halves = [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
        tf.config.set_logical_device_configuration(device, halves)
        measured = accuracies(model, int(number))
    else:
        strategy = "single" if what == "alone" else tfdist.init().strategy
        measured = [step(MODELS[model], int(number), name, strategy) for name in names]
    if tfdist.is_chief():
        print("measured", measured, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
