"""What a model's step is made of, found before it trains on several replicas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tfdist import _keras
from tfdist.data.source import Source
from tfdist.strategies.base import Strategy
from tfdist.strategies.whole import whole

_LARGE = 2**24
_ROWS = 256  # of a batch that is tried; few steps look at more of them at once


@dataclass(frozen=True)
class Composition:
    """What was found of one of a model's steps.

    Attributes:
        compiled_state: Changes when the model is compiled again.
        step: What it is made of besides the model.
        indivisible: Why replicas cannot share a batch, a few words; None if they can.
    """

    compiled_state: tuple[Any, ...]
    step: _keras.Step
    indivisible: str | None = None


def compose(
    model: Any, kind: str, source: Source, strategy: Strategy, whole_batch: bool | None = None
) -> Strategy:
    """Builds a model, and decides whether replicas share a batch or each compute all of it.

    Args:
        model: A `keras.Model`, compiled unless it predicts.
        kind: "train_step", "test_step" or "predict_step".
        source: The data.
        strategy: Where the replicas are.
        whole_batch: What the user wants, or None.

    Returns:
        The strategy, or what computes whole batches in its processes.
    """
    memory = _keras.attached(model).compositions
    known: Composition | None = memory.get(kind)
    if known is None or not _keras.is_compiled_as(model, known.compiled_state):
        step = _keras.build(model, kind, source.spec(), source.sample)
        _keras.note_metrics(model, step.metrics)
        found = None
        if strategy.place.num_shares > 1 and whole_batch is None:
            found = _why_indivisible(model, kind, step, source)
        known = Composition(_keras.compiled_state(model), step, found)
        memory[kind] = known
    is_whole = known.indivisible is not None if whole_batch is None else whole_batch
    return whole(strategy) if is_whole and strategy.place.num_replicas > 1 else strategy


def found_in_steps(model: Any) -> list[_keras.Step]:
    """Lists what a model's steps are made of besides the model.

    Args:
        model: A `keras.Model`.
    """
    return [known.step for known in _keras.attached(model).compositions.values()]


def why_whole(model: Any, kind: str) -> str | None:
    """Says why replicas cannot share a batch.

    Args:
        model: A `keras.Model` that was composed.
        kind: "train_step" or "test_step".
    """
    known: Composition | None = _keras.attached(model).compositions.get(kind)
    return None if known is None else known.indivisible


def _why_indivisible(model: Any, kind: str, step: _keras.Step, source: Source) -> str | None:
    if step.updates_in_branch:
        return "its step applies an optimizer in a branch, a loop or a tf.function"
    if step.raw:
        return f"its step writes the tf.Variable {step.raw[0]!r}, of which each process has one"
    for layer in _keras.layers_of(model):
        if getattr(layer, "stateful", False):
            return f"the layer {layer.name!r} is stateful: its rows go on with the last batch's"
    if _has_static_batch(model):
        return "its input has a batch size that is fixed"
    for metric in _keras.metrics_of(model):
        if not metric.variables:
            return f"the metric {metric.name!r} keeps what it has seen in no variable"
    elements = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    if elements > _LARGE and not _keras.has_own_code(model):
        return None  # few of Keras's own layers can mix rows, and the steps would take long
    shapes = [spec.shape for spec in tf.nest.flatten(source.spec())]
    of_row = sum(math.prod(size or 1 for size in s[1:]) if s.rank else 1 for s in shapes)
    rows = _keras.rows_to_try(of_row, _ROWS)
    sample = source.sample(rows)
    if sample is None:
        return None
    found = _keras.what_is_no_mean(
        _keras.step_of(model, kind),
        sample,
        rows,
        _keras.computes_coarsely(model),
        predicts=kind == "predict_step",
    )
    if found is None and step.assigns_weights and step.is_random:
        return "its step assigns weights by itself"
    return None if found is None else f"{found} is no mean over the rows of a batch"


def _has_static_batch(model: Any) -> bool:
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
    return any(len(tensor.shape) and tensor.shape[0] is not None for tensor in inputs)
