"""Finds what a model's step uses, and whether replicas can share a batch."""

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
_ROWS = 256  # rows of a trial batch; few steps combine more rows than that


@dataclass(frozen=True)
class Composition:
    """What one of a model's steps uses.

    Attributes:
        compiled_state: Differs if the model has been compiled again.
        step: The optimizers, metrics and variables that the step uses.
        indivisible: Why replicas cannot share a batch, in a few words; None if they can.
    """

    compiled_state: tuple[Any, ...]
    step: _keras.StepTrace
    indivisible: str | None = None


def compose(
    model: Any, kind: str, source: Source, strategy: Strategy, whole_batch: bool | None = None
) -> Strategy:
    """Builds a model, and decides whether replicas share a batch or each compute all of it.

    Args:
        model: A `keras.Model`, compiled unless it predicts.
        kind: "train_step", "test_step" or "predict_step".
        source: The data.
        strategy: The strategy of this process.
        whole_batch: The argument of `fit`. None lets tfdist decide.

    Returns:
        The strategy, or a wrapper of it with which each process computes whole batches.
    """
    compositions = _keras.attached(model).compositions
    composition: Composition | None = compositions.get(kind)
    if composition is None or not _keras.is_compiled_as(model, composition.compiled_state):
        step = _keras.build(model, kind, source.spec(), source.sample)
        _keras.note_metrics(model, step.metrics)
        reason = None
        if strategy.place.num_shares > 1 and whole_batch is None:
            reason = _why_indivisible(model, kind, step, source)
        composition = Composition(_keras.compiled_state(model), step, reason)
        compositions[kind] = composition
    # An argument of the user is followed, whatever the trial says.
    is_whole = composition.indivisible is not None if whole_batch is None else whole_batch
    return whole(strategy) if is_whole and strategy.place.num_replicas > 1 else strategy


def traced_steps(model: Any) -> list[_keras.StepTrace]:
    """Lists the traces of a model's steps.

    Args:
        model: A `keras.Model`.
    """
    return [composition.step for composition in _keras.attached(model).compositions.values()]


def why_whole(model: Any, kind: str) -> str | None:
    """Returns why replicas cannot share a batch, or None.

    Args:
        model: A `keras.Model` for which `compose` was called.
        kind: "train_step" or "test_step".
    """
    composition: Composition | None = _keras.attached(model).compositions.get(kind)
    return None if composition is None else composition.indivisible


def why_indivisible(model: Any, source: Source) -> str | None:
    """Returns why replicas could not share a batch in training, or None.

    Args:
        model: A compiled `keras.Model`.
        source: The data.
    """
    step = _keras.build(model, "train_step", source.spec(), source.sample)
    return _why_indivisible(model, "train_step", step, source)


def why_rows_mix(model: Any, source: Source) -> str | None:
    """Returns why a model's outputs for an example depend on other examples, or None.

    Models of Keras's own layers are not tried.

    Args:
        model: A built `keras.Model`.
        source: The data.
    """
    kind = "predict_step"
    if not _keras.has_own_code(model):
        return None
    step = _keras.build(model, kind, source.spec(), source.sample)
    return _why_indivisible(model, kind, step, source)


def _why_indivisible(
    model: Any, kind: str, step: _keras.StepTrace, source: Source
) -> str | None:
    # What the trace shows comes first, since it costs nothing. Trial steps come last.
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
    elsewhere = _keras.metric_that_begins_elsewhere(model)
    if elsewhere is not None:
        return f"the metric {elsewhere!r} has a state that is not zero at first"
    elements = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    is_large = elements > _LARGE or any(map(_keras.deferred, model.variables))
    if is_large and not _keras.has_own_code(model):
        return None  # trial steps would take long, and few of Keras's own layers mix rows
    shapes = [spec.shape for spec in tf.nest.flatten(source.spec())]
    of_row = sum(math.prod(size or 1 for size in s[1:]) if s.rank else 1 for s in shapes)
    rows = _keras.rows_to_try(of_row, _ROWS)
    sample = source.sample(rows)
    if sample is None:
        return None
    no_mean = _keras.what_is_no_mean(
        _keras.step_of(model, kind),
        sample,
        rows,
        _keras.computes_coarsely(model),
        predicts=kind == "predict_step",
    )
    if no_mean is None and step.assigns_weights and step.is_random:
        return "its step assigns weights by itself"
    return None if no_mean is None else f"{no_mean} is no mean over the rows of a batch"


def _has_static_batch(model: Any) -> bool:
    if isinstance(model, keras.Sequential):
        return False  # Keras built it for the size of a first batch; its layers take any size
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
    return any(len(tensor.shape) and tensor.shape[0] is not None for tensor in inputs)
