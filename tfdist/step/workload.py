"""Describes a model, its data and its batch in numbers, for predictions."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist.cluster.cost import Rates
from tfdist.data import Source
from tfdist.errors import ArgumentError
from tfdist.step.composition import why_indivisible
from tfdist.step.flops import work_of
from tfdist.step.liveness import liveness
from tfdist.step.measured import timed_steps
from tfdist.strategies.base import Place
from tfdist.strategies.choice.workload import StepMemory, Workload

_STEP_S, _INPUT_S = 0.4, 0.4  # how long is measured
_MOST_BATCHES = 200


def describe(
    model: Any,
    batch: Any,
    shares: Sequence[tuple[int, int]],
    *,
    source: Source | None = None,
    measure: bool = True,
) -> Workload:
    """Describes a training.

    Args:
        model: A compiled `keras.Model`, built by `_keras.build`.
        batch: A batch: `x`, `(x, y)` or `(x, y, sample_weight)`, nested tensors.
        shares: Pairs of rows and cores that one device may get.
        source: The data, if they are known.
        measure: Whether the step and the input pipeline may be timed.
    """
    x, y = _x_and_y(batch)
    batch_size = int(_keras.rows_of(batch))
    row_counts = sorted({batch_size, *(min(rows, batch_size) for rows, _ in shares)})
    graphs = {rows: _graph(model, rows, x, y) for rows in row_counts}
    lives = {rows: liveness(graph) for rows, graph in graphs.items()}
    row_bytes = sum(_bytes_of_row(leaf) for leaf in tf.nest.flatten(batch))
    life = lives[batch_size]
    notes = []
    if life.loops:
        notes.append(f"not counted: what is inside the loops {', '.join(life.loops)}")
    if life.unsized:
        notes.append(f"not counted: {life.unsized} tensors of unknown shape")
    trainable = model.trainable_variables
    measured = {}
    if measure:
        points = sorted({(min(rows, batch_size), cores) for rows, cores in shares})
        measured = timed_steps(model, batch, points, _STEP_S)
    return Workload(
        model=model.name,
        batch_size=batch_size,
        parameters=sum(math.prod(variable.shape) for variable in trainable),
        variables=len(trainable),
        weight_bytes=sum(map(_keras.num_bytes, model.variables)),
        gradient_bytes=life.gradients,
        slot_bytes=_slots(model),
        work=work_of(graphs[batch_size]),
        memory={
            rows: StepMemory(found.activations, found.peak, rows * row_bytes)
            for rows, found in lives.items()
        },
        measured_s=measured,
        rows=_rows(source, batch_size),
        data_bytes=_data_bytes(source),
        input_s=_input_s(source) if measure and source is not None else None,
        indivisible=None if source is None else why_indivisible(model, source),
        notes=tuple(notes),
    )


def _x_and_y(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple):
        return batch, None
    return batch[0], batch[1] if len(batch) > 1 else None


def _graph(model: Any, rows: int, x: Any, y: Any) -> _keras.StepGraph:
    specs = _keras.batch_specs(model, rows, x, y)
    if specs is None:
        raise ArgumentError(
            "`x` must be given for a model that does not know the shapes of its inputs. "
            f"Received: model {model.name!r} and x=None. Pass some examples."
        )
    return _keras.step_graph(model, *specs)


def _slots(model: Any) -> int:
    optimizers = _keras.with_nested(_keras.optimizers_of(model))
    total: int = sum(_keras.num_bytes(v) for o in optimizers for v in o.variables)
    return total


def _bytes_of_row(leaf: Any) -> int:
    size: int = math.prod(leaf.shape[1:]) * leaf.dtype.size
    return size


def _rows(source: Source | None, batch_size: int) -> int | None:
    if source is None:
        return None
    rows = getattr(source.drawn_from, "num_rows", None)
    if rows is not None:
        return int(rows)
    return None if source.batches is None else source.batches * batch_size


def _data_bytes(source: Source | None) -> int:
    columns = None if source is None else source.drawn_from.columns
    if columns is None:
        return 0
    leaves = tf.nest.flatten(columns)
    return sum(math.prod(leaf.shape) * int(leaf.dtype.size) for leaf in leaves)


def first_batch(source: Source) -> Any:
    """Returns the first global batch, or made-up data of its shape if it can be drawn once.

    Args:
        source: The data.
    """
    if source.repeatable:
        for share in source.shares(Place()).take(1):
            return share.data
    return source.sample()


def _input_s(source: Source) -> float | None:
    """Times the input pipeline alone: the mean over some batches, after the first ones."""
    if not source.repeatable:
        return None
    batches = iter(source.shares(Place()))
    warm_up = sum(1 for _ in itertools.islice(batches, 2))
    began, count = time.perf_counter(), 0
    for _ in itertools.islice(batches, _MOST_BATCHES):
        count += 1
        if time.perf_counter() - began > _INPUT_S:
            break
    return (time.perf_counter() - began) / count if warm_up and count else None


def measured_rates(cores: int) -> Rates:
    """Measures how fast this machine computes, in about half a second.

    Args:
        cores: Number of cores, for the text.
    """
    side = 768
    square = tf.ones([side, side])
    flat = tf.ones([2**22])
    tiny = tf.ones([8])

    def products(value: Any) -> Any:
        for _ in range(4):
            value = tf.matmul(value, square) / side
        return value

    def chain(value: Any) -> Any:
        for _ in range(200):
            value = tf.sin(value)  # no two of them are joined
        return value

    add = tf.function(lambda value: value + 1.0)
    op_s = _median_s(tf.function(chain), tiny) / 200
    flops = 4 * 2.0 * side**3 / _median_s(tf.function(products), square)
    moved = 2.0 * 4 * 2**22 / _median_s(add, flat)
    return Rates(flops, moved, op_s, f"measured on {cores} cores")


def _median_s(function: Any, value: Any) -> float:
    times = []
    for _ in range(12):
        began = time.perf_counter()
        function(value).numpy()
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))
