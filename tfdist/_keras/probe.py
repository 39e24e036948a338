"""Tests whether the results of a step are means over rows, by a run on a sample.

Replicas split a batch, and their gradients, statistics and results are weighted by their
numbers of rows. That is right for means. But a step may also sum, count, or compare the rows of
a batch. So the step runs on a sample and on its parts, from the same state. The results of the
parts together must equal those of the whole sample.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfdist._keras.discovery import keeping_random_state, recording, rows_of
from tfdist._keras.means import parts_of
from tfdist._keras.replica import ReplicaBatch, Tensor
from tfdist._keras.replicated import replicated

_FINE, _COARSE = 1e-5, 3e-2  # relative tolerances for rounding errors
_MEAN, _SUM, _SAME, _ROWS = "mean", "sum", "same", "rows"


class _StepResult(NamedTuple):
    """A result of a step, and the rule by which the results of parts combine to it."""

    kind: str
    value: Any


class _Part(ReplicaBatch):
    """A part of the sample. Exchanges between replicas return the whole sample's values."""

    def __init__(self, begin: int, end: int, total: int, exchanged: list[Any]) -> None:
        rows, offset = tf.constant(end - begin, tf.int64), tf.constant(begin, tf.int64)
        super().__init__(rows, tf.constant(total, tf.int64), offset, self._sums, self._rows)
        self._is_whole = end - begin == total
        self._exchanged = exchanged
        self._next = iter(exchanged)

    def _sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(self.of_whole(lambda: list(tensors)))

    def _rows(self, tensor: Tensor) -> Tensor:
        return self.of_whole(lambda: tensor)

    def of_whole(self, compute: Callable[[], Any]) -> Any:
        """Computes a value of the whole sample. A part gets it too, without gradient."""
        if self._is_whole:
            self._exchanged.append(tf.nest.map_structure(tf.stop_gradient, compute()))
            return self._exchanged[-1]
        return next(self._next)


def what_is_no_mean(
    step: Callable[[Any], Any],
    sample: Any,
    rows: int,
    is_coarse: bool = False,
    predicts: bool = False,
) -> str | None:
    """Names a result of a step that is no mean over rows, if there is one.

    Args:
        step: A function of a batch, such as `model.train_step`, of a built model.
        sample: A batch of at least two rows.
        rows: The largest number of rows to use.
        is_coarse: Whether numbers are rounded to half precision.
        predicts: Whether the step returns a row for each of its rows, and changes nothing.

    Returns:
        A few words. None if all results are means, or if the test is not possible: because
        the step draws random numbers that are no function of a row, or fails on the sample.
    """
    if any(not isinstance(leaf, tf.Tensor) for leaf in tf.nest.flatten(sample)):
        return None
    total = min(int(rows_of(sample)), rows)
    if total < 2:
        return None
    tolerance = _COARSE if is_coarse else _FINE
    try:
        with replicated():
            exchanged: list[Any] = []
            observed = functools.partial(_observed, step, predicts)
            whole = observed(sample, _Part(0, total, total, exchanged))
            parts = _run_on_parts(observed, sample, total, exchanged)
            if parts is not None and _differing(whole, parts, whole, tolerance) is None:
                return None  # nearly always: no need to measure rounding errors
            # Runs again with other random numbers: the results must not depend on them.
            with keeping_random_state():
                tf.random.uniform([]), random.random(), np.random.rand()
                again = observed(sample, _Part(0, total, total, []))
            expected = {name: fact._replace(kind=_SAME) for name, fact in whole.items()}
            if _differing(expected, [(total, again)], expected, tolerance) is not None:
                return None
            # A slightly changed sample shows how much the step amplifies rounding errors.
            nearby = observed(_nearby(sample), _Part(0, total, total, []))
    except Exception:  # the step may fail on a sample in any way
        return None
    if parts is None:
        return "its step, which does not run on some rows of a batch,"
    return _differing(whole, parts, nearby, tolerance)


def metric_that_is_no_sum(step: Callable[[Any], Any], sample: Any, rows: int) -> str | None:
    """Names a variable of a metric that a second, equal step does not change as the first did.

    It is one whose state is a maximum or the last value, say. The loss may compare rows.

    Args:
        step: A function of a batch, such as `model.train_step`, of a built model.
        sample: A batch.
        rows: The largest number of rows to use.

    Returns:
        The path of the variable. None if there is none, or if the step fails on the sample.
    """
    total = min(int(rows_of(sample)), rows)
    data = tf.nest.map_structure(lambda leaf: leaf[:total], sample)
    part = _Part(0, total, total, [])
    try:
        with replicated(), keeping_random_state(), recording(part) as recorder:
            states: list[list[Any]] = []
            for _ in range(2):
                with keeping_random_state():
                    step(data)
                states.append([tf.convert_to_tensor(v.value) for v, _ in recorder.before])
                of_metrics = {id(v) for v, _ in recorder.before}
                with part.updating():
                    for variable, value in list(part.touched.values()):
                        if id(variable) not in of_metrics:
                            variable.assign(value)
            for (variable, _), once, twice in zip(recorder.before, *states, strict=True):
                once, twice = (np.asarray(value, "float64") for value in (once, twice))
                if not np.allclose(twice, 2 * once, rtol=1e-3, atol=1e-6, equal_nan=True):
                    return str(variable.path)
    except Exception:  # the step may fail on a sample in any way
        return None
    return None


def _run_on_parts(
    observed: Callable[[Any, _Part], dict[str, _StepResult]],
    sample: Any,
    total: int,
    exchanged: list[Any],
) -> list[tuple[int, dict[str, _StepResult]]] | None:
    """Returns the number of rows and the step's results of each part, or None if it fails."""
    results = []
    for begin, end in parts_of(total):
        try:
            facts = observed(sample, _Part(begin, end, total, exchanged))
        except Exception:
            return None
        results.append((end - begin, facts))
    return results


def _observed(
    step: Callable[[Any], Any], predicts: bool, sample: Any, part: _Part
) -> dict[str, _StepResult]:
    begin = int(part.offset)
    end = begin + int(part.rows)
    rows = tf.nest.map_structure(lambda leaf: leaf[begin:end], sample)
    facts: dict[str, _StepResult | None] = {}
    with keeping_random_state(), recording(part) as recorder:
        returned = step(rows)
        for number, (variable, gradient) in enumerate(recorder.gradients):
            name = f"the gradient of {variable.path}, update {number}"
            facts[name] = None if gradient is None else _fact(_MEAN, gradient)
        for variable, _ in part.touched.values():
            is_reduced = tf.as_dtype(variable.dtype).is_floating and not predicts
            kind = _MEAN if is_reduced else _SAME
            facts[f"the variable {variable.path}"] = _fact(kind, variable.value)
        for variable, _ in recorder.before:
            facts[f"the metric's variable {variable.path}"] = _fact(
                _SAME if predicts else _SUM, variable.value
            )
        for number, leaf in enumerate(tf.nest.flatten(returned)):
            if part.metric_of(leaf) is None:
                kind = _ROWS if predicts else _MEAN
                facts[f"result {number} of the step"] = _fact(kind, leaf)
    return {name: fact for name, fact in facts.items() if fact is not None}


def _fact(kind: str, value: Any) -> _StepResult | None:
    tensor = tf.convert_to_tensor(value)  # also makes tf.IndexedSlices dense
    if tensor.dtype != tf.bool and not (tensor.dtype.is_floating or tensor.dtype.is_integer):
        return None
    return _StepResult(kind, tf.cast(tensor, tf.float64).numpy())


def _nearby(sample: Any) -> Any:
    """Changes the last digits of a sample."""
    return tf.nest.map_structure(
        lambda leaf: leaf * (1 + 1e-6) if leaf.dtype.is_floating else leaf, sample
    )


def _differing(
    whole: dict[str, _StepResult],
    parts: Sequence[tuple[int, dict[str, _StepResult]]],
    nearby: dict[str, _StepResult],
    tolerance: float,
) -> str | None:
    """Names the first fact that does not follow from those of the parts, except rounding."""
    if any(whole.keys() != facts.keys() for facts in (nearby, *(f for _, f in parts))):
        return None
    with np.errstate(invalid="ignore", over="ignore"):  # comparisons with NaN are False
        return _first_different(whole, parts, nearby, tolerance)


def _first_different(
    whole: dict[str, _StepResult],
    parts: Sequence[tuple[int, dict[str, _StepResult]]],
    nearby: dict[str, _StepResult],
    tolerance: float,
) -> str | None:
    means = [float(np.linalg.norm(f.value)) for f in whole.values() if f.kind == _MEAN]
    for name, (kind, value) in whole.items():
        values = [(rows, facts[name].value) for rows, facts in parts]
        expected = _expected(kind, values)
        if expected is None or expected.shape != value.shape:
            return name
        size = max(np.linalg.norm(value), *(np.linalg.norm(part) for _, part in values))
        rounding = np.linalg.norm(value - nearby[name].value)
        allowed = tolerance * size + 20 * rounding + 1e-6 * max(means, default=0.0) + 1e-7
        if np.linalg.norm(value - expected) > allowed:
            return name
    return None


def _expected(kind: str, parts: Sequence[tuple[int, Any]]) -> Any:
    """Combines the parts' numbers of rows and values into the expected value of the whole.

    Returns:
        An array, or None if the parts do not fit together.
    """
    first = parts[0][1]
    if kind == _ROWS:
        shapes = [(rows, *first.shape[1:]) for rows, _ in parts]
        if not first.ndim or shapes != [value.shape for _, value in parts]:
            return None
        return np.concatenate([value for _, value in parts])
    if any(value.shape != first.shape for _, value in parts):
        return None
    if kind == _SAME:
        return first
    total = sum(rows for rows, _ in parts) if kind == _MEAN else 1
    return sum((rows if kind == _MEAN else 1) / total * value for rows, value in parts)
