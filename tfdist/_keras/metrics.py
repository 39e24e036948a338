"""Metrics of a share. Their increments are summed over replicas.

A model may store metrics anywhere. So a metric is recorded when a step updates it, and a
result when the step computes it. The returned values of a step are then recognized by identity.
"""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.compile_utils import CompileMetrics

from tfdist._keras.attached import attached
from tfdist._keras.interception import Method, Replacement, in_family
from tfdist._keras.losses import gathered, sees_whole_batch
from tfdist._keras.reads import noting_reads
from tfdist._keras.replica import Tensor, current_batch


def replacements() -> list[Replacement]:
    """Lists the replacements for metrics while several replicas train or evaluate."""
    metric = keras.metrics.Metric
    # `MeanMetricWrapper.update_state` has two replacements. The last one applies, and calls
    # the first.
    return [
        *in_family(metric, "update_state", _recorded_update),
        *in_family(metric, "result", _recorded_result),
        (keras.metrics.MeanMetricWrapper, "update_state", _updated_by_whole_batch),
    ]


def _recorded_update(original: Method) -> Method:
    # These two are also updated with one number for a batch, such as its loss.
    counts_scalars = original in (
        keras.metrics.Mean.update_state,
        keras.metrics.Sum.update_state,
    )

    @functools.wraps(original)
    def update_state(metric: Any, *args: Any, **kwargs: Any) -> Any:
        batch = current_batch()
        if batch is not None and batch.is_shared:
            batch.begin_metric(metric)
            if counts_scalars:
                args, kwargs = _scalar_weighted(args, kwargs, batch.share)
        with noting_reads(False):  # a metric reads its own state in order to update it
            return original(metric, *args, **kwargs)

    return update_state


_keras_update_by_function = keras.metrics.MeanMetricWrapper.update_state


@functools.wraps(_keras_update_by_function)
def _updated_by_whole_batch(
    metric: Any, y_true: Any, y_pred: Any, sample_weight: Any = None
) -> Any:
    """Gives the whole batch to a function that compares its rows."""
    batch = current_batch()
    if batch is not None and batch.is_shared:
        function = functools.partial(metric._fn, **metric._fn_kwargs)
        value = function(y_true, y_pred)
        if sees_whole_batch(function, value, y_true, y_pred):
            y_true, y_pred = batch.gather(y_true), batch.gather(y_pred)
            if tf.convert_to_tensor(value).shape.rank:  # each replica counts all rows in part
                fractions = tf.fill([tf.shape(y_true)[0]], batch.share)
                weights = 1.0 if sample_weight is None else gathered(sample_weight)
                sample_weight = _weighted(fractions, tf.cast(weights, tf.float32))
    update = _recorded_update(_keras_update_by_function)
    return update(metric, y_true, y_pred, sample_weight)


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    return weights * tf.reshape(rows, [-1] + [1] * max(0, weights.shape.rank - 1))


def _scalar_weighted(
    args: tuple[Any, ...], kwargs: dict[str, Any], share: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Weighs a scalar of a batch, such as its loss, so that all replicas count it once."""
    arguments = dict(zip(("values", "sample_weight"), args, strict=False)) | kwargs
    is_scalar = tf.convert_to_tensor(arguments["values"]).shape.rank == 0
    if is_scalar and arguments.get("sample_weight") is None:
        arguments["sample_weight"] = share
    return (), arguments


def _recorded_result(original: Method) -> Method:
    @functools.wraps(original)
    def result(metric: Any, *args: Any, **kwargs: Any) -> Any:
        value = original(metric, *args, **kwargs)
        batch = current_batch()
        if batch is not None:
            batch.note_result(metric, value)
        return value

    return result


def metrics_of(model: Any) -> list[Any]:
    """Lists the metrics that a model's training and evaluation update.

    Args:
        model: A `keras.Model`.
    """
    return [
        inner
        for metric in model.metrics
        for inner in (metric.metrics if isinstance(metric, CompileMetrics) else [metric])
    ]


def metric_that_begins_elsewhere(model: Any) -> str | None:
    """Names a metric whose state is not zero at first, so that it is no sum: a minimum, say.

    Args:
        model: A compiled, built `keras.Model`.
    """
    for metric in metrics_of(model):
        before = [(v, v.numpy()) for v in metric.variables]
        metric.reset_state()
        begins = [v.numpy() for v in metric.variables]
        for variable, value in before:
            variable.assign(value)
        if any(np.any(value != 0) for value in begins):
            return str(metric.name)
    return None


def metric_variables(model: Any) -> list[Any]:
    """Lists the variables of a model's metrics, each once.

    Args:
        model: A compiled, built `keras.Model`.

    Returns:
        `keras.Variable`s.
    """
    of_layers = [metric for layer in model._flatten_layers() for metric in layer._metrics]
    metrics = [*model.metrics, *of_layers]
    variables = [v for metric in metrics for v in metric.variables]
    variables += attached(model).metric_variables
    return list({id(variable): variable for variable in variables}.values())


def note_metrics(model: Any, variables: list[Any]) -> None:
    """Records variables of metrics that a model's steps update but the model does not list.

    Args:
        model: A `keras.Model`.
        variables: `keras.Variable`s.
    """
    attached(model).metric_variables += variables
