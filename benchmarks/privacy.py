"""DP-SGD in one process: a private step over a plain step, with all that belongs to it.

python -m benchmarks.privacy [--cpu] [--opacus PYTHON] [--tensorflow-privacy PYTHON] [MODEL ...]

Both are steps of `tfdist.fit`, with Adam, batch 256, in the same process; the private one
with clipping, noise and Poisson sampling, so that its batches have 256 examples on average.
With `--cpu` it is the time that processors worked for this process, on all cores together:
other programs disturb it less, and what is well dealt out to cores gets no credit.
Given interpreters of environments that have other libraries, their ratios are measured beside
them, on the same models and as many threads: Opacus with hooks and with ghost clipping, over
PyTorch's plain step, and tensorflow-privacy's vectorized optimizer over Keras 2's; of fewer
steps, since some are slow. Ratios compare, milliseconds need not.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import ast
import math
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

import tfdist
from benchmarks.elsewhere import cnn, encoder, mlp
from benchmarks.models import compiled, digits
from benchmarks.report import Ratio, compare, ratio, show

BATCH = 256
PAIRS = 9
Make = Callable[[Any], Any]
Clock = Callable[[], float]


MODELS: dict[str, tuple[Make, tuple[int, ...], str, int, str]] = {
    "MLP 784-512-256-10": (mlp, (784,), "float32", 60, "<= 1.6"),
    "MNIST CNN": (cnn, (28, 28, 1), "float32", 30, "<= 1.8"),
    "encoder d=128": (encoder, (64,), "int32", 4, "<= 1.2"),
}


class Steps(keras.callbacks.Callback):  # type: ignore[misc]
    """Times the steps of an epoch but for the first, which waits for the data."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = self._clock()
        if batch == 0:
            self.start = now
        self.mean = (now - self.start) / max(1, batch)


def step(model: Any, x: Any, y: Any, steps: int, privacy: Any, clock: Clock) -> float:
    """Gives the mean milliseconds of a step of a traced model."""
    timed = Steps(clock)
    options = {"batch_size": BATCH, "steps_per_epoch": steps, "verbose": 0}
    tfdist.fit(model, x, y, callbacks=[timed], privacy=privacy, **options)
    return 1000 * timed.mean


def measure(name: str, clock: Clock) -> Ratio:
    make, shape, dtype, steps, goal = MODELS[name]
    x, y = digits(20_000, shape, dtype)
    private, plain = compiled(make(keras)), compiled(make(keras))
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.1, delta=1e-5)
    ours = lambda: step(private, x, y, steps + 1, privacy, clock)  # noqa: E731
    theirs = lambda: step(plain, x, y, steps + 1, None, clock)  # noqa: E731
    ours(), theirs()
    return compare(name, ours, theirs, PAIRS, goal, "ms")


def elsewhere(library: str, python: str, name: str, mode: str) -> Ratio:
    """Measures another library's ratio in its own environment; none if it fails there."""
    short = next(word for word in ("MLP", "CNN", "encoder") if word in name)
    steps, pairs = (max(2, MODELS[name][3] // 10), 5) if library == "Opacus" else (2, 3)
    worker = Path(__file__).with_name(f"{library.lower().replace('-', '_')}_worker.py")
    settings = map(str, (short, mode, steps, pairs, os.cpu_count()))
    done = subprocess.run(
        [python, str(worker), *settings],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    found = re.search(r"measured (\[.*\])", done.stdout)
    if done.returncode or not found:
        print(f"{library} {mode}, {name}: failed\n{done.stdout[-500:]}{done.stderr[-1000:]}")
        return Ratio(f"{name}, {library} {mode}", math.nan, math.nan, math.nan, "", "failed")
    private, plain = zip(*ast.literal_eval(found[1]), strict=True)
    detail = f"{statistics.median(private):.4g} / {statistics.median(plain):.4g} ms"
    ratios = [a / b for a, b in zip(private, plain, strict=True)]
    return ratio(f"{name}, {library} {mode}", ratios, "", detail)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--opacus", metavar="PYTHON")
    parser.add_argument("--tensorflow-privacy", metavar="PYTHON")
    parser.add_argument("names", nargs="*", metavar="MODEL")
    options = parser.parse_args()
    others = [("Opacus", options.opacus, mode) for mode in ("hooks", "ghost")]
    others.append(("tensorflow-privacy", options.tensorflow_privacy, "vectorized"))
    clock = time.process_time if options.cpu else time.perf_counter
    found = []
    for name in MODELS:
        if options.names and not any(n in name for n in options.names):
            continue
        found.append(measure(name, clock))
        found += [elsewhere(lib, python, name, mode) for lib, python, mode in others if python]
    unit = ", processor time" if options.cpu else ""
    show(f"Private step over plain step, batch 256{unit}", found)


if __name__ == "__main__":
    main()
