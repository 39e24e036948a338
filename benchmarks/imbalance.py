"""Unbalanced data: rows/s of the samplers, and what each remedy does to a model.

python -m benchmarks.imbalance [speed] [streams] [setup] [quality]

The input road is compared as it is used, features gathered, with what tf.data and, if it is
installed, imbalanced-learn offer for the same. Quality is the mean over seeds, and its
standard deviation.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import dataclasses
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits, make_classification
from sklearn.metrics import average_precision_score, balanced_accuracy_score, recall_score

import tfdist
from benchmarks.input_road import drain
from benchmarks.report import Ratio, compare, seconds, show
from tfdist import ByClass, data, samplers
from tfdist.imbalance import LogitAdjustedCrossentropy, correct_prior, stratified_split
from tfdist.strategies.base import Place

BATCH = 256
SEEDS = range(5)
Ways = dict[str, dict[str, Any]]


# --- speed ------------------------------------------------------------------------------


def two_classes(rows: int, columns: int, share: float) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    y = (rng.random(rows) < share).astype("int32")
    return rng.normal(size=(rows, columns)).astype("float32"), y


def rate(iterator: Any, steps: int) -> float:
    """Gives rows/s once the pipeline has begun."""
    drain(iterator, 2)
    return steps * BATCH / seconds(lambda: drain(iterator, steps))


def ours(x: Any, y: Any, sampler: samplers.Sampler, steps: int) -> Callable[[], float]:
    settings = data.Settings(BATCH, None, sampler, shuffle=True, seed=1, training=True)
    source = data.read(x, y, None, settings)
    return lambda: rate(iter(source.shares(Place(), 0)), steps)


def sample_from_datasets(x: Any, y: Any, steps: int) -> Callable[[], float]:
    """A stream for each class, mixed half and half, as TensorFlow's guide shows it."""

    def stream(label: int) -> Any:
        rows = np.flatnonzero(y == label)
        dataset = tf.data.Dataset.from_tensor_slices((x[rows], y[rows]))
        return dataset.shuffle(min(len(rows), 10_000), seed=1).repeat()

    streams = [stream(0), stream(1)]
    mixed = tf.data.Dataset.sample_from_datasets(streams, [0.5, 0.5], seed=1)
    return lambda: rate(iter(mixed.batch(BATCH).prefetch(tf.data.AUTOTUNE)), steps)


def rejection_resample(x: Any, y: Any, steps: int) -> Callable[[], float]:
    """Rows of the large class thrown away until classes are equal."""
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(10_000, seed=1).repeat()
    share = float(y.mean())
    kept = dataset.rejection_resample(
        lambda _, label: label, [0.5, 0.5], [1 - share, share], seed=1
    ).map(lambda _, row: row)
    return lambda: rate(iter(kept.batch(BATCH).prefetch(tf.data.AUTOTUNE)), steps)


def balanced_batch_generator(x: Any, y: Any, steps: int) -> Callable[[], float] | None:
    """imbalanced-learn's generator, random under-sampling, drained in Python."""
    try:
        from imblearn.tensorflow import balanced_batch_generator as make
    except ImportError:
        return None

    def measure() -> float:
        generator, _ = make(x, y, batch_size=BATCH, random_state=1)
        next(generator)
        return steps * BATCH / seconds(lambda: [next(generator) for _ in range(steps)])

    return measure


def speed() -> None:
    results: list[Ratio] = []
    for rows, columns, share in ((100_000, 64, 1 / 20), (1_000_000, 16, 1 / 200)):
        x, y = two_classes(rows, columns, share)
        kinds = {
            "ClassBalanced": samplers.ClassBalanced(),
            "Undersample": samplers.Undersample(),
            "Oversample": samplers.Oversample(),
            "Stratified": samplers.Stratified(),
            "Weighted": samplers.Weighted(1.0 + y),
        }
        steps = 2000
        others = {
            "sample_from_datasets": (sample_from_datasets(x, y, 50), "ClassBalanced"),
            "rejection_resample": (rejection_resample(x, y, 3), "ClassBalanced"),
            "balanced_batch_generator": (balanced_batch_generator(x, y, steps), ""),
        }
        for other, (theirs, only) in others.items():
            if theirs is None:
                continue
            for name in [only] if only else kinds:
                title = f"{name} / {other}, {rows:,} x {columns}, 1:{1 / share:.0f}"
                mine = ours(x, y, kinds[name], steps)
                mine(), theirs()
                pairs = 3 if only else 15
                results.append(compare(title, mine, theirs, pairs, ">= 1.0", "rows/s"))
                print(results[-1], file=sys.stderr, flush=True)
    show("Rows/s of the samplers, features gathered", results)


def streams() -> None:
    """Draws from a dataset, and from one for each class, as tf.data's own way does."""
    x, y = two_classes(100_000, 64, 1 / 20)
    whole = tf.data.Dataset.from_tensor_slices((x, y))
    by_class = {c: tf.data.Dataset.from_tensor_slices((x[y == c], y[y == c])) for c in (0, 1)}
    filtered = {c: whole.filter(lambda _, label, c=c: label == c) for c in (0, 1)}

    def drawn(kind: Any, steps: int) -> Callable[[], float]:
        settings = data.Settings(BATCH, None, samplers.ClassBalanced(), True, 1, True)
        source = data.read(kind, None, None, settings)
        return lambda: rate(iter(source.shares(Place(), 0)), steps)

    def mixed(parts: dict[int, Any], steps: int) -> Callable[[], float]:
        repeated = [part.repeat() for part in parts.values()]
        rows = tf.data.Dataset.sample_from_datasets(repeated, [0.5, 0.5], seed=1)
        return lambda: rate(iter(rows.batch(BATCH).prefetch(tf.data.AUTOTUNE)), steps)

    uncached = ByClass(whole, buffer_size=0)
    results = [
        compare(name, mine, theirs, 5, ">= 1.0", "rows/s")
        for name, mine, theirs in (
            ("a dict of datasets", drawn(by_class, 300), mixed(by_class, 40)),
            ("one dataset, the small class kept", drawn(whole, 300), mixed(filtered, 5)),
            ("one dataset, none kept", drawn(uncached, 10), mixed(filtered, 5)),
        )
    ]
    start = time.perf_counter()
    drawn(whole.batch(BATCH), 1)
    print(f"Counting 100,000 examples in batches took {time.perf_counter() - start:.2f} s.")
    show("Rows/s of ClassBalanced over sample_from_datasets, tf.data as input", results)


def setup() -> None:
    """Seconds until the first batch, and memory, with 10 million labels."""
    rows = 10_000_000
    table = Table(title=f"{rows:,} labels")
    for column in ("", "classes", "ready after", "kept", "at most"):
        table.add_column(column, justify="right" if column else "left")
    facts = []
    for classes in (2, 1000):
        rng = np.random.default_rng(0)
        y = np.minimum(rng.geometric(0.01 if classes > 2 else 0.95, rows), classes) - 1
        y = y.astype("int32")
        for sampler in (
            samplers.Uniform(), samplers.ClassBalanced(), samplers.Undersample(),
            samplers.Oversample(), samplers.Stratified(), samplers.Weighted(1.0 + y),
        ):  # fmt: skip

            def begin(sampler: Any = sampler, y: Any = y) -> Any:
                bound = dataclasses.replace(sampler).bind(y, rows)
                bound.batches(0, 128, num_rows=rows, batch_size=BATCH, seed=1)
                return bound

            took = min(seconds(begin) for _ in range(3))
            tracemalloc.start()
            kept = begin()
            now, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            del kept
            name = type(sampler).__name__
            cells = (f"{took:.2f} s", f"{now / 2**20:.0f} MiB", f"{most / 2**20:.0f} MiB")
            table.add_row(name, str(classes), *cells)
            facts.append([name, classes, took, now, most])
    Console(width=110).print(table)
    print(json.dumps({"title": "set-up", "rows": rows, "facts": facts}), flush=True)


# --- quality ----------------------------------------------------------------------------


def rare_digits(seed: int) -> tuple[Any, Any]:
    """Digits; in training, one in 50 of each odd one."""
    x, y = load_digits(return_X_y=True)
    (x, y), held_out = stratified_split(
        (x / 16).astype("float32"), y.astype("int32"), fraction=0.3, seed=seed
    )
    keep = y % 2 == 0
    for digit in range(1, 10, 2):
        rows = np.flatnonzero(y == digit)
        keep[rows[: -(-len(rows) // 50)]] = True
    return (x[keep], y[keep]), held_out


def rare_class(seed: int) -> tuple[Any, Any]:
    """Generated, two classes at 1:200, in training and held out alike."""
    x, y = make_classification(
        40_000, 20, n_informative=6, n_redundant=4, n_clusters_per_class=3,
        weights=[1 - 1 / 201], flip_y=0, class_sep=0.8, random_state=seed,
    )  # fmt: skip
    return stratified_split(x.astype("float32"), y.astype("int32"), fraction=0.5, seed=seed)


def ways(counts: Any) -> Ways:
    return {
        "untreated": {},
        'class_weight="balanced"': {"class_weight": "balanced"},
        'class_weight="effective"': {"class_weight": "effective"},
        "ClassBalanced()": {"sampler": samplers.ClassBalanced()},
        "ClassBalanced(0.5)": {"sampler": samplers.ClassBalanced(0.5)},
        "Undersample()": {"sampler": samplers.Undersample()},
        "Oversample()": {"sampler": samplers.Oversample()},
        "Stratified()": {"sampler": samplers.Stratified()},
        "focal loss": {"loss": "focal"},
        "logit-adjusted loss": {"loss": LogitAdjustedCrossentropy(counts)},
        "ClassBalanced(), correct_prior": {
            "sampler": samplers.ClassBalanced(),
            "correct": True,
        },
        "untreated, correct_prior to equal": {"correct_from": counts},
    }


def logits_of(way: dict[str, Any], train: Any, held_out: Any, seed: int, steps: int) -> Any:
    """Trains a small network in one way and gives the held-out rows' logits."""
    x, y = train
    classes, counts = int(y.max()) + 1, np.bincount(y)
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((x.shape[1],)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(classes),
        ]
    )
    loss = way.get("loss") or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    targets = y
    if loss == "focal":
        loss, targets = (
            keras.losses.CategoricalFocalCrossentropy(from_logits=True, alpha=1.0),
            np.eye(classes, dtype="float32")[y],
        )
    model.compile(keras.optimizers.Adam(2e-3), loss)
    tfdist.fit(
        model, x, targets, batch_size=64, epochs=1, steps_per_epoch=steps, seed=seed, verbose=0,
        sampler=way.get("sampler"), class_weight=way.get("class_weight"),
    )  # fmt: skip
    if way.get("correct"):
        model = correct_prior(model, true=counts, from_logits=True)
    if "correct_from" in way:
        model = correct_prior(model, np.ones(classes), way["correct_from"], from_logits=True)
    return tfdist.predict(model, held_out[0], batch_size=4096, verbose=0)


def figures(logits: Any, y: Any, rare: list[int]) -> list[float]:
    """Balanced accuracy, mean recall and PR-AUC of rare classes, calibration error."""
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    p = exponents / exponents.sum(1, keepdims=True)
    chosen = p.argmax(1)
    recall = recall_score(y, chosen, labels=rare, average="macro", zero_division=0)
    precision = np.mean([average_precision_score(y == c, p[:, c]) for c in rare])
    sure = p.max(1)
    # Expected calibration error, 15 bins of equal width (Guo et al., 2017, equation 3).
    bins = np.minimum((sure * 15).astype(int), 14)
    gaps = np.bincount(bins, (chosen == y) - sure, minlength=15)
    return [
        balanced_accuracy_score(y, chosen),
        float(recall),
        float(precision),
        float(np.abs(gaps).sum() / len(y)),
    ]


def quality() -> None:
    sets: dict[str, tuple[Callable[[int], Any], list[int], int]] = {
        "digits, odd ones cut to 1/50": (rare_digits, [1, 3, 5, 7, 9], 600),
        "generated, two classes at 1:200": (rare_class, [1], 1500),
    }
    for title, (make, rare, steps) in sets.items():
        start = time.perf_counter()
        found: dict[str, list[list[float]]] = {}
        for seed in SEEDS:
            train, held_out = make(seed)
            for name, way in ways(np.bincount(train[1])).items():
                logits = logits_of(way, train, held_out, seed, steps)
                found.setdefault(name, []).append(figures(logits, held_out[1], rare))
        table = Table(title=f"{title}: {len(SEEDS)} seeds, {steps} steps of 64")
        for column in ("", "balanced accuracy", "rare recall", "rare PR-AUC", "ECE"):
            table.add_column(column, justify="right" if column else "left")
        for name, runs in found.items():
            means, spreads = np.mean(runs, 0), np.std(runs, 0, ddof=1)
            cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(means, spreads, strict=True)]
            table.add_row(name, *cells)
        Console(width=110).print(table)
        print(json.dumps({"title": title, "runs": found}), flush=True)
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    parts = {"speed": speed, "streams": streams, "setup": setup, "quality": quality}
    for part in sys.argv[1:] or parts:
        parts[part]()
