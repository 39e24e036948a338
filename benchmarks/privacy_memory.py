"""Memory of private training: the peak of a private step over that of a plain step.

python -m benchmarks.privacy_memory [MODEL ...]

Each measurement is a process of its own on Linux, which builds the model and makes steps of
`tfdist.fit`, plain or private, with Adam and batch 256. It gives the highest resident memory
during them (the kernel's VmHWM, set back before), less what was resident when training began:
so what Python, TensorFlow, the data and the accountant take counts on neither side. Tracing
does. The accountant, which computes epsilon before, takes some 30 MiB more, once.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import keras

import tfdist
from benchmarks.memory import mib, reset_peak
from benchmarks.models import compiled, digits
from benchmarks.privacy import BATCH, MODELS
from benchmarks.report import Ratio, compare, show

PAIRS = 3
STEPS = {"MLP 784-512-256-10": 60, "MNIST CNN": 30, "encoder d=128": 4}


def work(name: str, kind: str) -> None:
    """Makes steps in this process and prints its peak."""
    make, shape, dtype, *_ = MODELS[name]
    x, y = digits(4096, shape, dtype)
    model = compiled(make(keras))
    privacy = tfdist.DPSGD(1.0, noise_multiplier=1.1, delta=1e-5) if kind == "private" else None
    options: dict[str, Any] = {"batch_size": BATCH, "verbose": 0, "privacy": privacy}
    begun = Begun()
    tfdist.fit(model, x, y, steps_per_epoch=STEPS[name], callbacks=[begun], **options)
    print(f"peak {mib('VmHWM') - begun.resident:.1f}", flush=True)


class Begun(keras.callbacks.Callback):  # type: ignore[misc]
    """Notes what is resident when training begins, and measures the peak from there."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.resident = mib("VmRSS")
        reset_peak()


def peak(name: str, kind: str) -> float:
    """Measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.privacy_memory", "--work", name, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    found = re.search(r"^peak (\S+)$", done.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{command}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(found[1])


def measure(name: str) -> Ratio:
    ours, theirs = (lambda k=kind: peak(name, k) for kind in ("private", "plain"))
    return compare(name, ours, theirs, PAIRS, "<= 1.5", "MiB")


def main(*names: str) -> None:
    wanted = [name for name in MODELS if not names or any(n in name for n in names)]
    found = [measure(name) for name in wanted]
    show("Memory of private steps over that of plain ones, batch 256", found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:4])
    else:
        main(*sys.argv[1:])
