"""Measures each worker's steps, and reports a straggler: a worker that the others wait for."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.figures import text_table
from tfdist.step.timers import StepTimers, StepTimes, has_clocks
from tfdist.strategies.base import Strategy
from tfdist.watchdog import here

_MAX_STEPS = 1000  # the last steps of an epoch that are compared, and those of the report
_MIN_STEPS = 20  # steps that a meaningful median needs
_STEP, _DATA, _REDUCING = range(3)  # columns of the measured times
_NOTABLE_FRACTION = 0.1  # of a step
_NOTABLE_S = 2.0  # of the whole training


@dataclass(frozen=True)
class WorkerTimes:
    """The times of one worker's steps, in seconds: arrays of shape [steps].

    Attributes:
        step: Time from the end of one step to the end of the next. It is about equal on all
            workers.
        work: The part of `step` before the worker contributes to the reduction: data,
            callbacks, computation.
        data: The part of `work` before the step has its data.
        waiting: Time from the worker's contribution to that of the last worker.
    """

    step: Any
    work: Any
    data: Any
    waiting: Any

    def row(self) -> list[str]:
        """Returns the cells of a table: median and 95th percentile, in ms."""
        parts = (self.step, self.work, self.data, self.waiting)
        return [
            f"{1e3 * np.median(part):.1f} / {1e3 * np.percentile(part, 95):.1f}"
            for part in parts
        ]


def compare_workers(measured: Sequence[Any]) -> list[WorkerTimes]:
    """Computes each worker's times, from a comparison of their reductions.

    All workers end the reduction of a step at the same time. So the shortest reduction is that
    of the last worker. The others have waited for the rest of their reductions.

    Args:
        measured: For each worker an array of shape [steps, 3], in seconds: the times of the
            step, its data and its reduction.
    """
    shortest = np.min([m[:, _REDUCING] for m in measured], axis=0)
    return [
        WorkerTimes(
            m[:, _STEP], m[:, _STEP] - m[:, _REDUCING], m[:, _DATA], m[:, _REDUCING] - shortest
        )
        for m in measured
    ]


def straggler(times: Sequence[WorkerTimes], seconds: float) -> str | None:
    """Names the straggler, if the others wait for it for a notable time.

    Args:
        times: The times of each worker.
        seconds: Time of all steps. `times` may have only the last of them.

    Returns:
        A sentence, or None if the wait is below a tenth of a step, or below 2 s in total.
    """
    work = [float(np.median(of_worker.work)) for of_worker in times]
    slowest = int(np.argmax(work))
    others = [i for i in range(len(times)) if i != slowest]
    waited = float(np.median([np.median(times[i].waiting) for i in others]))
    step = float(np.median(times[slowest].step))
    if waited < step * max(_NOTABLE_FRACTION, _NOTABLE_S / seconds):
        return None
    data = float(np.median(times[slowest].data))
    most_is_data = data > 0.5 * (work[slowest] - float(np.median([work[i] for i in others])))
    return (
        f"worker {slowest} holds the others back: they wait for it {1e3 * waited:.1f} ms of a "
        f"step of {1e3 * step:.1f} ms ({waited / step:.0%})"
        + (f", and it for its data {1e3 * data:.1f} ms" if most_is_data else "")
    )


def format_table(times: Sequence[WorkerTimes], note: str) -> str:
    """Formats the straggler report.

    Args:
        times: The times of each worker.
        note: The line below the table.
    """
    head = ["step", "own work", "of it data", "waiting"]
    rows = [[f"worker {i}", *of_worker.row()] for i, of_worker in enumerate(times)]
    title = f"tfdist: {len(times[0].step)} steps by worker, ms, median / 95th percentile"
    return "\n".join([title, text_table([["", *head], *rows]), f"tfdist: {note}"])


class StragglerCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Measures the steps of all workers, writes them for TensorBoard, and reports a straggler.

    Args:
        strategy: A strategy with several workers.
        timers: The step timers.
        shows: Whether this process prints.
        log_dir: The log directory of the user's TensorBoard callback, if this process has one.
    """

    def __init__(
        self, strategy: Strategy, timers: StepTimers, shows: bool, log_dir: str | None
    ) -> None:
        super().__init__()
        self._strategy = strategy
        self._timers = timers
        self._shows = shows
        self._log_dir = log_dir
        self._epoch_times = array("d")  # three numbers a step
        self._epochs: list[Any] = []  # the times of each worker, by epoch
        self._seconds = 0.0
        self._last_read: StepTimes | None = None
        self._writer: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins to measure."""
        self._last_read = None
        here.on_step = self._note

    def _note(self, between: float, lasted: float) -> None:
        times, before = self._timers.read(), self._last_read
        self._last_read = times
        steps = 0.0 if before is None else times.steps - before.steps
        if before is None or not steps:  # leaves out the first step, whose tracing takes long
            return
        self._epoch_times.extend(
            (
                (between + lasted) / steps,
                (times.data - before.data) / steps,
                (times.reducing - before.reducing) / steps,
            )
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Compares the workers, and writes for TensorBoard."""
        local_times = np.reshape(np.asarray(self._epoch_times), [-1, 3])
        self._seconds += float(np.sum(local_times[:, _STEP]))
        local_times = local_times[-_MAX_STEPS:]
        self._epoch_times = array("d")
        self._last_read = self._timers.read()
        measured = self._strategy.gather_objects(local_times)
        steps = min(map(len, measured))
        if not steps:
            return
        measured = [m[-steps:] for m in measured]
        self._epochs = [*self._epochs, measured][-_MAX_STEPS:]
        if self._log_dir is not None:
            self._write(epoch, compare_workers(measured))

    def on_train_end(self, logs: Any = None) -> None:
        """Shows the report, if there is a straggler."""
        here.on_step = None
        if self._writer is not None:
            self._writer.close()
        if self._shows and sum(len(epoch[0]) for epoch in self._epochs) >= _MIN_STEPS:
            joined = [
                np.concatenate(epochs)[-_MAX_STEPS:]
                for epochs in zip(*self._epochs, strict=True)
            ]
            times = compare_workers(joined)
            note = straggler(times, self._seconds)
            if note is not None:
                print(format_table(times, note), flush=True)

    def _write(self, epoch: int, times: Sequence[WorkerTimes]) -> None:
        if self._writer is None:
            folder = os.path.join(str(self._log_dir), "workers")
            self._writer = tf.summary.create_file_writer(folder)
        names = ("step", "work", "data", "waiting") if has_clocks() else ("step",)
        with self._writer.as_default():
            for worker, of_worker in enumerate(times):
                for name in names:
                    values = 1e3 * getattr(of_worker, name)
                    tag = f"worker_{worker}/{name}_ms"
                    tf.summary.scalar(f"{tag}_median", np.median(values), step=epoch)
                    tf.summary.scalar(f"{tag}_p95", np.percentile(values, 95), step=epoch)
        self._writer.flush()
