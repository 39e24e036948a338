"""What private gradients and updates may depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism.unfit_layers import check_untouched, keeps_state

Tensor = Any
Result = TypeVar("Result")


def gradients_alone(
    model: Any, batch: ReplicaBatch, compute: Callable[[], tuple[Any, list[Tensor], Tensor]]
) -> tuple[Any, list[Tensor], Tensor]:
    """Computes clipped gradients, which must not depend on what metrics have of others.

    Args:
        model: A compiled, built `keras.Model`.
        batch: The description of the replica's batch.
        compute: As `clipped_share`, whose result it returns.

    Raises:
        ArgumentError: They depend on a metric.
    """
    with _keras.tracing_part() as part:
        outputs, sums, votes = compute()
    variable = part.dependence((sums, votes), _of_metrics(model, batch))
    if variable is not None:
        raise ArgumentError(
            "An example's gradient must not depend on other examples: layers and losses must "
            "not read a loss or metric, which has values of all of them and no noise. "
            f"Received: {variable.path!r}, which is read. Leave it out."
        )
    return outputs, sums, votes


def updated_alone(model: Any, batch: ReplicaBatch, update: Callable[[], Result]) -> Result:
    """Computes a part of an update, which must not depend on metrics: they have no noise.

    Args:
        model: A compiled, built `keras.Model`.
        batch: The description of the replica's batch.
        update: Computes tensors, or assigns variables.

    Raises:
        ArgumentError: It depends on a metric.
    """
    with _keras.tracing_part() as part:
        result = update()
    variable = part.dependence(result, _of_metrics(model, batch))
    if variable is not None:
        raise ArgumentError(
            "The update must depend on the examples by the noisy gradient alone: the "
            "optimizer, its learning rate's schedule and regularizers must not read a "
            f"loss or metric, which has no noise. Received: {variable.path!r}, which is "
            "read. Leave it out."
        )
    return result


@contextlib.contextmanager
def keeping_no_state(model: Any, batch: ReplicaBatch) -> Iterator[None]:
    """Makes a context for a part of a step that may write metrics and seeds, and nothing else.

    Args:
        model: A compiled, built `keras.Model`.
        batch: The description of the replica's batch.

    Raises:
        ArgumentError: It writes something else, applies an optimizer, or calls Python code,
            which may keep anything.
    """
    updates, batch.updates = batch.updates, _NoUpdates()
    try:
        with _keras.tracing_part() as part:
            yield
    finally:
        batch.updates = updates
    check_untouched(model, batch)
    seeds = [v for v in model.variables if keras_layers.is_seed(v)]
    if _keras.has_global_seed():
        seeds.append(_keras.global_seed_variable())
    touched = [variable for variable, _ in batch.touched.values()]
    written = part.written([*_of_metrics(model, batch), *seeds, *touched])
    if written is not None:
        raise keeps_state(written)
    python = part.python()
    if python is not None:
        raise ArgumentError(
            "A private model must not call Python code in its steps, which may remember "
            f"examples. Received: a step with TensorFlow's {python}. Use operations of Keras "
            "or TensorFlow."
        )


class _NoUpdates:
    """Refuses updates. They would be made beside the private one, without clipping or noise."""

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Returns the loss as it is."""
        return loss

    def apply(self, optimizer: Any, *_: Any) -> None:
        """Refuses an update.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(
            "Only the private update may change weights. Received: a layer, loss or metric "
            f"that applies the optimizer {optimizer.name!r}, without clipping or noise. Leave "
            "it out."
        )


def _of_metrics(model: Any, batch: ReplicaBatch) -> list[Any]:
    return [*_keras.metric_variables(model), *batch.of_metrics.values()]


def penalties(variables: Any) -> list[Tensor | None]:
    """Returns the gradients of the variables' regularizers.

    Args:
        variables: `keras.Variable`s.
    """
    gradients: list[Tensor | None] = []
    for variable in variables:
        if variable.regularizer is None:
            gradients.append(None)
            continue
        value = tf.cast(tf.convert_to_tensor(variable), tf.float32)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(value)
            penalty = variable.regularizer(value)
        gradients.append(tape.gradient(penalty, value))
    return gradients
