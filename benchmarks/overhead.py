"""One process: `tfdist.fit` over Keras's own `Model.fit`, same model and data.

python -m benchmarks.overhead
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable
from typing import Any

import keras

import tfdist
from benchmarks.models import cnn, digits, mlp
from benchmarks.report import Ratio, compare, seconds, show

MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "MLP 784-256-128-10": (mlp, (784,)),
    "CNN 28x28x1": (cnn, (28, 28, 1)),
}


def warm(name: str, batch_size: int, rows: int, pairs: int) -> Ratio:
    """An epoch of a model whose functions are traced."""
    make, shape = MODELS[name]
    ours, theirs = make(), make()
    x, y = digits(rows, shape)
    options = {"batch_size": batch_size, "verbose": 0}
    tfdist.fit(ours, x, y, **options)
    theirs.fit(x, y, **options)
    return compare(
        f"{name}, batch {batch_size}",
        lambda: seconds(lambda: tfdist.fit(ours, x, y, **options)),
        lambda: seconds(lambda: theirs.fit(x, y, **options)),
        pairs,
        "<= 1.02",
    )


def first(name: str, batch_size: int, rows: int, pairs: int) -> Ratio:
    """A first epoch, tracing included."""
    make, shape = MODELS[name]
    x, y = digits(rows, shape)
    options = {"batch_size": batch_size, "verbose": 0}

    def measure(fit: Callable[..., Any]) -> float:
        keras.backend.clear_session()
        model = make()
        return seconds(lambda: fit(model, x, y, **options))

    return compare(
        f"{name}, batch {batch_size}, first fit",
        lambda: measure(tfdist.fit),
        lambda: measure(keras.Model.fit),
        pairs,
        "<= 1.1",
    )


def main() -> None:
    results = []
    for name in MODELS:
        slow = name.startswith("CNN")
        for batch_size in (64, 512):
            rows = 6_000 if slow else 20_000  # half a second: a noisy machine drifts slower
            results.append(warm(name, batch_size, rows, pairs=21))
        results.append(first(name, 64, 6_400, pairs=7))
    show("tfdist.fit over Model.fit, one process", results)


if __name__ == "__main__":
    main()
