"""Memory and time of a step with recomputed blocks over those of a step that keeps activations.

python -m benchmarks.recompute

The runs alternate, each in a process of its own on Linux, with Adam. Memory is the peak during
steps (the kernel's VmHWM, set back before), less what was resident when model and optimizer
were built. `tfdist.memory` estimates it for comparison.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from typing import Any

import keras
import numpy as np

import tfdist
from benchmarks.memory import Steps, mib
from benchmarks.report import ratio, show

L = keras.layers
PAIRS, STEPS = 2, 6


def mlp() -> tuple[Any, Any, Any]:
    """12 blocks of 4 dense layers of 512, batch 2048."""

    def block() -> Any:
        return keras.Sequential([L.Dense(512, "tanh") for _ in range(4)] + [L.Dropout(0.1)])

    model = keras.Sequential([keras.Input((512,)), *[block() for _ in range(12)], L.Dense(1)])
    x = np.random.default_rng(0).normal(size=(2048, 512)).astype("float32")
    return model, x, x[:, :1]


class EncoderBlock(L.Layer):  # type: ignore[misc]
    """Attention and a feed-forward part, with normalization before each."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norms = [L.LayerNormalization() for _ in range(2)]
        self.attention = L.MultiHeadAttention(4, size // 4, dropout=0.1)
        self.wide, self.narrow = L.Dense(4 * size, "gelu"), L.Dense(size)

    def call(self, x: Any) -> Any:
        y = self.norms[0](x)
        x = x + self.attention(y, y)
        return x + self.narrow(self.wide(self.norms[1](x)))


def encoder() -> tuple[Any, Any, Any]:
    """8 blocks of a transformer, d=256, sequences of 128, batch 16."""
    words = keras.Input((128,), dtype="int32")
    x = L.Embedding(1000, 256)(words)
    for _ in range(8):
        x = EncoderBlock(256)(x)
    model = keras.Model(words, L.Dense(1)(L.GlobalAveragePooling1D()(x)))
    rng = np.random.default_rng(0)
    return model, rng.integers(0, 1000, (16, 128)), rng.normal(size=(16, 1)).astype("float32")


MODELS = {"MLP, 12 blocks": mlp, "encoder, 8 blocks": encoder}


def work(name: str, kind: str) -> None:
    """Trains in this process, and prints MiB, ms and the estimated MiB of a step."""
    model, x, y = MODELS[name]()
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    if kind == "recomputed":
        tfdist.recompute(model)
    batch = len(x)
    data, targets = np.concatenate([x] * STEPS), np.concatenate([y] * STEPS)
    built, steps = mib("VmRSS"), Steps()
    tfdist.fit(model, data, targets, batch_size=batch, verbose=0, seed=1, callbacks=[steps])
    measured = mib("VmHWM") - built
    estimated = tfdist.memory(model, batch).device.step / 2**20
    print(f"measured {measured} {statistics.median(steps.times[2:]) * 1e3} {estimated}")


def run(name: str, kind: str) -> list[float]:
    """Measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.recompute", name, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    found = re.search(r"measured (\S+) (\S+) (\S+)", done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"{command}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return [float(number) for number in found.groups()]


def main() -> None:
    tables: list[list[Any]] = [[], [], []]
    units = ("MiB", "ms", "MiB, estimated")
    for name in MODELS:
        pairs = []
        for pair in range(PAIRS):
            order = ("recomputed", "kept") if pair % 2 == 0 else ("kept", "recomputed")
            results = {kind: run(name, kind) for kind in order}
            pairs.append((results["recomputed"], results["kept"]))
        for index, unit in enumerate(units):
            values = [(ours[index], theirs[index]) for ours, theirs in pairs]
            middle = [statistics.median(column) for column in zip(*values, strict=True)]
            detail = f"{middle[0]:.4g} / {middle[1]:.4g} {unit}"
            tables[index].append(ratio(name, [a / b for a, b in values], "", detail))
    show("Memory of a step, blocks recomputed / kept", tables[0])
    show("Time of a step, blocks recomputed / kept", tables[1])
    show("tfdist.memory's estimate, blocks recomputed / kept", tables[2])


if __name__ == "__main__":
    work(*sys.argv[1:3]) if len(sys.argv) > 2 else main()
