"""How fast each worker steps, and who holds the rest back."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.step.timers import StepTimers, Times, has_clocks
from tfdist.strategies.base import Strategy
from tfdist.watchdog import here

_KEPT = 1000  # steps of an epoch, and of the table at the end
_FEWEST = 20  # of which a median tells something
_STEP, _DATA, _REDUCING = range(3)
_NOTABLE = 0.1  # of a step
_NOTABLE_S = 2.0  # of the whole training


@dataclass(frozen=True)
class Pace:
    """Of one worker, in seconds a step: arrays of shape [steps].

    Attributes:
        step: From the end of one step to the end of the next: the same for all workers, but
            for what they do when the others do not wait for them.
        work: Of it, until the worker had its part of the sums: data, callbacks, computing.
        data: Of that, until the step had its data.
        waiting: From there, until the last worker had its part.
    """

    step: Any
    work: Any
    data: Any
    waiting: Any

    def row(self) -> list[str]:
        """Gives a table's cells: median and 95th percentile, ms."""
        parts = (self.step, self.work, self.data, self.waiting)
        return [
            f"{1e3 * np.median(part):.1f} / {1e3 * np.percentile(part, 95):.1f}"
            for part in parts
        ]


def paces(measured: Sequence[Any]) -> list[Pace]:
    """Compares the workers step by step.

    All reductions of a step end together, so the one that takes least is that of the worker
    that came last: what others take more, they waited.

    Args:
        measured: Of each worker an array of shape [steps, 3], seconds: the step, its data, its
            reduction.
    """
    least = np.min([m[:, _REDUCING] for m in measured], axis=0)
    return [
        Pace(m[:, _STEP], m[:, _STEP] - m[:, _REDUCING], m[:, _DATA], m[:, _REDUCING] - least)
        for m in measured
    ]


def straggler(found: Sequence[Pace], seconds: float) -> str | None:
    """Names the worker for which the others wait, if they do so for a notable time.

    Args:
        found: Of each worker.
        seconds: That all steps took, of which `found` may be the last.

    Returns:
        A sentence, or None where it is less than a tenth of a step, or than 2 s in all.
    """
    work = [float(np.median(pace.work)) for pace in found]
    slowest = int(np.argmax(work))
    others = [i for i in range(len(found)) if i != slowest]
    waited = float(np.median([np.median(found[i].waiting) for i in others]))
    step = float(np.median(found[slowest].step))
    if waited < step * max(_NOTABLE, _NOTABLE_S / seconds):
        return None
    data = float(np.median(found[slowest].data))
    most_is_data = data > 0.5 * (work[slowest] - float(np.median([work[i] for i in others])))
    return (
        f"worker {slowest} holds the others back: they wait for it {1e3 * waited:.1f} ms of a "
        f"step of {1e3 * step:.1f} ms ({waited / step:.0%})"
        + (f", and it for its data {1e3 * data:.1f} ms" if most_is_data else "")
    )


def table(found: Sequence[Pace], note: str) -> str:
    """Writes the summary.

    Args:
        found: Of each worker.
        note: What is said below.
    """
    head = ["step", "own work", "of it data", "waiting"]
    rows = [[f"worker {i}", *pace.row()] for i, pace in enumerate(found)]
    lines = [["", *head], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) + 1)]
    listed = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    title = f"tfdist: {len(found[0].step)} steps by worker, ms, median / 95th percentile"
    return "\n".join([title, *listed, f"tfdist: {note}"])


class StragglerCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Measures the steps of all workers, shows them in TensorBoard, and who holds them back.

    Args:
        strategy: Where the replicas are, on several workers.
        timers: Clocks inside of the steps.
        shows: Whether this process prints.
        log_dir: Of the user's TensorBoard in this process, if there is one.
    """

    def __init__(
        self, strategy: Strategy, timers: StepTimers, shows: bool, log_dir: str | None
    ) -> None:
        super().__init__()
        self._strategy = strategy
        self._timers = timers
        self._shows = shows
        self._log_dir = log_dir
        self._epoch = array("d")
        self._all: list[Any] = []
        self._seconds = 0.0
        self._before: Times | None = None
        self._writer: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins to measure."""
        self._before = None
        here.on_step = self._note

    def _note(self, between: float, lasted: float) -> None:
        times, before = self._timers.read(), self._before
        self._before = times
        steps = 0.0 if before is None else times.made - before.made
        if before is None or not steps:  # the first step is traced, which takes long
            return
        self._epoch.extend(
            (
                (between + lasted) / steps,
                (times.data - before.data) / steps,
                (times.reducing - before.reducing) / steps,
            )
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Compares the workers, and writes for TensorBoard."""
        mine = np.reshape(np.asarray(self._epoch), [-1, 3])
        self._seconds += float(np.sum(mine[:, _STEP]))
        mine = mine[-_KEPT:]
        self._epoch = array("d")
        self._before = self._timers.read()
        measured = self._strategy.gather_objects(mine)
        steps = min(map(len, measured))
        if not steps:
            return
        measured = [m[-steps:] for m in measured]
        self._all = [*self._all, measured][-_KEPT:]
        if self._log_dir is not None:
            self._write(epoch, paces(measured))

    def on_train_end(self, logs: Any = None) -> None:
        """Shows the table, if a worker held the others back."""
        here.on_step = None
        if self._writer is not None:
            self._writer.close()
        if self._shows and sum(len(parts[0]) for parts in self._all) >= _FEWEST:
            joined = [np.concatenate(parts)[-_KEPT:] for parts in zip(*self._all, strict=True)]
            found = paces(joined)
            note = straggler(found, self._seconds)
            if note is not None:
                print(table(found, note), flush=True)

    def _write(self, epoch: int, found: Sequence[Pace]) -> None:
        if self._writer is None:
            folder = os.path.join(str(self._log_dir), "workers")
            self._writer = tf.summary.create_file_writer(folder)
        known = ("step", "work", "data", "waiting") if has_clocks() else ("step",)
        with self._writer.as_default():
            for worker, pace in enumerate(found):
                for name in known:
                    values = 1e3 * getattr(pace, name)
                    tag = f"worker_{worker}/{name}_ms"
                    tf.summary.scalar(f"{tag}_median", np.median(values), step=epoch)
                    tf.summary.scalar(f"{tag}_p95", np.percentile(values, 95), step=epoch)
        self._writer.flush()
