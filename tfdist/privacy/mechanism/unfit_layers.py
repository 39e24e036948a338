"""Refuses models that DP-SGD cannot train privately, with the reason and the remedy."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError

_CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")


def check_untouched(model: Any, batch: ReplicaBatch) -> None:
    """Refuses a step that assigns variables other than metrics and seeds, while tracing.

    A seed may only advance: what follows from its value alone keeps nothing of the examples.

    Args:
        model: A built `keras.Model`.
        batch: The description of the replica's batch, which records assignments.

    Raises:
        ArgumentError: The step assigns another variable.
    """
    metrics = {id(variable) for variable in _keras.metric_variables(model)}
    for variable, _ in batch.touched.values():
        advances = keras_layers.is_seed(variable) and id(variable) not in batch.by_value
        if id(variable) not in metrics and not advances:
            raise keeps_state(variable.path)


def keeps_state(name: str) -> ArgumentError:
    """Makes the error about a variable that keeps state of the examples.

    Args:
        name: The name of the variable.
    """
    return ArgumentError(
        "A private model must keep no state of its examples: it would be saved with the "
        f"weights, without noise. Received: {name!r}, which changes when the model, its loss "
        "or its metrics are computed. Use a layer or a loss without it."
    )


def check_model(model: Any) -> None:
    """Refuses a model whose training would not be private.

    Args:
        model: A compiled `keras.Model`.

    Raises:
        ArgumentError: It has a custom step or a loss of the whole batch, a layer that mixes
            examples or is recomputed, or an optimizer that does more than update.
    """
    if _keras.has_own(model, "train_step"):
        raise ArgumentError(
            "A private model must have Keras's own `train_step`, which private training "
            f"replaces. Received: a {type(model).__name__} with a `train_step` of its own. "
            "Write the difference as `compute_loss`, which is called for one example at a time."
        )
    recomputed = _keras.recomputed_calls(model)
    if recomputed:
        raise ArgumentError(
            "A private model must keep its activations, from which the norm of each example's "
            "gradient is computed. Received: a model that recomputes the layer "
            f"{recomputed[0].layer.name!r}. Call tfdist.recompute(model, layers=[]) before "
            "`fit`, and save memory with DPSGD(microbatch_size=...)."
        )
    for layer in _keras.layers_of(model):
        if isinstance(layer, layers.BatchNormalization) and layer.trainable:
            raise ArgumentError(
                "A private model must not mix the examples of a batch. Received: the layer "
                f"{layer.name!r} of type BatchNormalization. Call "
                "tfdist.privacy.make_private_model(model), which puts GroupNormalization in "
                "its place."
            )
        if getattr(layer, "quantization_mode", None) == "float8" and layer.trainable:
            raise ArgumentError(
                "A private model must not keep the largest values it has seen, as training in "
                f"float8 does. Received: the layer {layer.name!r}, quantized to 'float8'. "
                "Use the policy 'mixed_bfloat16'."
            )
        if getattr(layer, "activity_regularizer", None) is not None:
            raise ArgumentError(
                "A private model must not have an `activity_regularizer`, which is of the "
                f"whole batch. Received: the layer {layer.name!r} with an "
                "`activity_regularizer`. Write it as `compute_loss`, which is called for one "
                "example at a time."
            )
    for variable in model.trainable_variables:
        if not tf.as_dtype(variable.dtype).is_floating:
            raise ArgumentError(
                "The trained weights of a private model must be real numbers, whose norm is "
                f"computed in float32. Received: {variable.path!r} of dtype {variable.dtype}. "
                "Keep its real and imaginary parts as two weights, or freeze it."
            )
    _check_optimizer(model.optimizer)
    _check_loss(model)


def check_metrics(model: Any, x: Any, y: Any, sample_weight: Any = None) -> None:
    """Refuses metrics that keep values of single examples, rather than a sum or a count.

    Metrics are updated with some examples, and then with the same ones in another order. A sum
    does not depend on the order. The state of all metrics is reset.

    Args:
        model: A compiled, built `keras.Model`.
        x: A few rows.
        y: Targets.
        sample_weight: The sample weights of Keras, or None.

    Raises:
        ArgumentError: The state of a metric depends on the order.
    """
    # Keras wraps the metrics of `compile` in one metric, which lists them.
    metrics = [inner for m in model.metrics for inner in getattr(m, "metrics", [m])]
    outputs = model(x, training=False)
    rows = tf.shape(tf.nest.flatten(outputs)[0])[0]
    states = []
    for order in (tf.range(rows), tf.range(rows)[::-1]):
        for metric in metrics:
            metric.reset_state()
        columns = tf.nest.map_structure(
            lambda leaf, order=order: leaf if leaf is None else tf.gather(leaf, order),
            (x, y, outputs, sample_weight),
        )
        model.compute_metrics(*columns)
        states.append({m.name: [v.numpy() for v in m.variables] for m in metrics})
    for metric in metrics:
        metric.reset_state()
    for name, values in states[0].items():
        for first, second in zip(values, states[1][name], strict=True):
            # Sums in another order differ by rounding only, a last value or a running mean by
            # much more.
            if not np.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise ArgumentError(
                    "A metric of private training must sum or count examples, in any order. "
                    f"Received: {name!r}, whose state depends on their order and so on single "
                    "examples. Compute it afterwards, with tfdist.evaluate."
                )


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ArgumentError(
            "A private model must not be trained by a LossScaleOptimizer, which skips steps "
            "because of single examples. Received: a LossScaleOptimizer, which Keras also adds "
            "for the policy 'mixed_float16'. Use 'mixed_bfloat16', or "
            "compile(auto_scale_loss=False)."
        )
    for name in _CLIPPING:
        if getattr(optimizer, name, None) is not None:
            raise ArgumentError(
                "The optimizer must not clip: each example's gradient is clipped already. "
                f"Received: {name}={getattr(optimizer, name)!r} of the optimizer. Leave it "
                "out: DPSGD's `l2_norm_clip` bounds each example."
            )
    if getattr(optimizer, "gradient_accumulation_steps", None):
        steps = optimizer.gradient_accumulation_steps
        raise ArgumentError(
            "A private step must draw all of its examples at once, and add its noise once. "
            f"Received: gradient_accumulation_steps={steps} of the optimizer. Leave it out, "
            "multiply `batch_size` by it, and pass DPSGD(microbatch_size=...), which needs no "
            "more memory."
        )


def _check_loss(model: Any) -> None:
    for loss in keras_layers.losses_of(model):
        name = loss if isinstance(loss, str) else getattr(loss, "name", None)
        if str(name).lower() == "circle" or isinstance(loss, keras.losses.Circle):
            raise ArgumentError(
                "The loss must be of single examples. Received: Circle, which compares the "
                "examples of a batch with each other. Use a loss that has one value for each "
                "example."
            )
    regularized = any(v.regularizer is not None for v in model.trainable_variables)
    if regularized and keras_layers.has_own_compute_loss(model):
        raise ArgumentError(
            "A model with a `compute_loss` of its own must have no regularizers: tfdist cannot "
            f"know whether `compute_loss` adds them. Received: a {type(model).__name__} with "
            "both. Use the optimizer's `weight_decay`."
        )
