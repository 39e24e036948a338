"""Times a model's training step on this machine. The model is as before afterwards."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist.step.state import variables_of

_WARM_UP = 2
_FEWEST, _MOST = 3, 200
_TASKS = "/proc/self/task"


def timed_steps(
    model: Any, batch: Any, points: Sequence[tuple[int, int]], limit_s: float
) -> dict[tuple[int, int], float]:
    """Times training steps with several numbers of rows and of cores.

    Weights, optimizer, metrics and random states are restored.

    Args:
        model: A compiled `keras.Model`, built by `_keras.build`.
        batch: A batch: `x`, `(x, y)` or `(x, y, sample_weight)`, nested tensors.
        points: Pairs of a number of rows, at most those of the batch, and a number of cores.
        limit_s: Seconds for each point, after the first steps, which compile.

    Returns:
        The median seconds of a step at each point.

    Raises:
        Exception: Any error of the step, as in Keras's own first step.
    """
    step = _compiled(model, batch)
    seconds = {}
    with _restored(model), _keras.keeping_random_state():
        for rows, cores in points:
            part = tf.nest.map_structure(lambda leaf, rows=rows: leaf[:rows], batch)
            with on_cores(cores):
                seconds[rows, cores] = _median_s(step, part, limit_s)
    return seconds


def _median_s(step: Any, batch: Any, limit_s: float) -> float:
    """Times one point."""
    for _ in range(_WARM_UP):
        _wait_for(step(batch))
    times: list[float] = []
    end = time.perf_counter() + limit_s
    while len(times) < _FEWEST or (time.perf_counter() < end and len(times) < _MOST):
        began = time.perf_counter()
        _wait_for(step(batch))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait_for(results: Any) -> None:
    """Waits until a device has finished. Calls on a GPU return before."""
    for leaf in tf.nest.flatten(results)[:1]:
        leaf.numpy()


def _compiled(model: Any, batch: Any) -> Any:
    """Makes the function of a step, for any number of rows, as Keras does."""
    train_step = _keras.step_of(model, "train_step")
    if model.run_eagerly:
        return train_step
    spec = tf.nest.map_structure(
        lambda leaf: tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype), batch
    )

    step = tf.autograph.experimental.do_not_convert(lambda data: train_step(data))
    return tf.function(step, input_signature=[spec], jit_compile=model.jit_compile or None)


@contextlib.contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Restores all state of a model at the end."""
    variables = variables_of(model)
    values = [tf.identity(variable.value) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keeps all threads of this process on some cores, where the system can do so.

    Args:
        count: Number of cores. With as many as the process has, nothing changes.
    """
    if not hasattr(os, "sched_setaffinity") or not os.path.isdir(_TASKS):
        yield
        return
    before = os.sched_getaffinity(0)
    own = {task: os.sched_getaffinity(task) for task in _tasks()}
    if count >= len(before):
        yield
        return
    _pin({task: set(sorted(before)[:count]) for task in own})
    try:
        yield
    finally:
        # Threads that began meanwhile are on the few cores too.
        _pin({task: own.get(task, before) for task in _tasks()})


def _tasks() -> list[int]:
    return [int(name) for name in os.listdir(_TASKS)]


def _pin(cores: dict[int, set[int]]) -> None:
    for task, allowed in cores.items():
        with contextlib.suppress(OSError):  # a thread may have ended
            os.sched_setaffinity(task, allowed)
