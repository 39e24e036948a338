"""What checkpoints and the watcher cost: a run on real digits with and without them.

python -m benchmarks.resilience

Two ratios of each pair of runs: of time, and of processor time of the first worker, which
other work of the machine hardly changes, and which waiting does not count in.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import tfdist
from benchmarks.models import cnn
from benchmarks.report import Ratio, compare, measured, ratio, seconds, show

EPOCHS, BATCH, PAIRS = 10, 64, 11


def images() -> tuple[Any, Any]:
    """The 1797 digits, 28x28 in place of 8x8."""
    found = load_digits()
    large = np.kron(found.images / 16, np.ones((3, 3)))
    return np.pad(large, ((0, 0), (2, 2), (2, 2)))[..., None].astype("float32"), found.target


def run(model: Any, x: Any, y: Any, folder: str | None) -> float:
    """Trains for some epochs; with a checkpoint of each and the watcher, or without both."""
    tfdist.init(hang_limit=0 if folder is None else 60)
    options: dict[str, Any] = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0, "seed": 1}
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        options["checkpoint"] = folder
    return seconds(lambda: tfdist.fit(model, x, y, **options))


def cost(name: str, pairs: int = PAIRS) -> list[Ratio]:
    """Compares runs by their time, and by that of the processor."""
    x, y = images()
    models = {"with": cnn(), "without": cnn()}
    used: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:

        def measure(kind: str) -> float:
            before = time.process_time()
            elapsed = run(models[kind], x, y, folder if kind == "with" else None)
            used[kind].append(time.process_time() - before)
            return elapsed

        for kind in models:
            measure(kind)  # traces
            used[kind].clear()
        ours, theirs = (lambda k=kind: measure(k) for kind in models)
        elapsed = compare(name, ours, theirs, pairs, "<= 1.02")
    of_pairs = [a / b for a, b in zip(used["with"], used["without"], strict=True)]
    return [elapsed, ratio(f"{name}, processor time", of_pairs, "<= 1.02")]


def main(place: str = "") -> None:
    if place:  # a worker
        tfdist.init(seed=1)
        keras.utils.set_random_seed(1)
        results = [asdict(r) for r in cost(place)]
        if tfdist.is_chief():
            print("measured", results, flush=True)
        return
    ratios = cost("one process")
    for strategy in ("multi_worker", "horovod"):
        options = ("-n", "2", "--strategy", strategy)
        ratios += [
            Ratio(**r) for r in measured(Path(__file__), f"two workers, {strategy}", *options)
        ]
    show("a checkpoint each epoch and the watcher over neither, digits CNN", ratios)


if __name__ == "__main__":
    main(*sys.argv[1:])
