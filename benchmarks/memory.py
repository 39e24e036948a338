"""What benchmarks of memory share: the kernel's figures of this process, and timed steps."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import keras


def mib(name: str) -> float:
    """Reads VmRSS or VmHWM of this process, in MiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def reset_peak() -> None:
    """Sets VmHWM back to what is resident."""
    Path("/proc/self/clear_refs").write_text("5")


class Steps(keras.callbacks.Callback):  # type: ignore[misc]
    """Times steps, and resets the peak after the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 2:
            reset_peak()
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.times.append(time.perf_counter() - self.began)
