"""What private gradients and updates may depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
    model: Any,
    batch: ReplicaBatch,
    given: Any,
    compute: Callable[[], tuple[Any, list[Tensor], Tensor]],
) -> tuple[Any, list[Tensor], Tensor]:
    """Computes clipped gradients, which must depend on this replica's rows alone.

    Args:
        model: A compiled, built `keras.Model`.
        batch: The description of the replica's batch.
        given: The replica's rows, and what else gradients may follow from, nested.
        compute: As `clipped_share`, whose result it returns.

    Raises:
        ArgumentError: They depend on a metric, or on a tensor of another part of the step.
    """
    with _keras.tracing_part() as part:
        outputs, sums, votes = compute()
    keys = () if batch.keys is None else (batch.keys.rows, batch.keys.secret)
    columns = [leaf for leaf in tf.nest.flatten(given) if leaf is not None]
    masks = [keras_layers.mask_of(leaf) for leaf in columns if keras_layers.has_mask(leaf)]
    known = [*columns, *masks, *keys, batch.rows, batch.total, batch.offset]
    read = part.dependence((sums, votes), _of_metrics(model, batch), known)
    if read is not None:
        raise ArgumentError(
            "An example's gradient must not depend on other examples: layers and losses must "
            "not read a loss or metric, which has values of all of them and no noise, nor a "
            f"tensor that Python code has kept. Received: {_keras.named(read)}, which is read. "
            "Leave it out."
        )
    return outputs, sums, votes


def updated_alone(
    model: Any, batch: ReplicaBatch, noisy: Sequence[Tensor], update: Callable[[], Result]
) -> Result:
    """Computes a part of an update, which must depend on examples by noisy sums alone.

    Args:
        model: A compiled, built `keras.Model`.
        batch: The description of the replica's batch.
        noisy: The noisy sums over all replicas.
        update: Computes tensors, or assigns variables.

    Raises:
        ArgumentError: It depends on a metric, or on examples in another way.
    """
    with _keras.tracing_part() as part:
        result = update()
    read = part.read_besides(noisy, result, _of_metrics(model, batch))
    if read is not None:
        raise ArgumentError(
            "The update must depend on the examples by the noisy gradient alone: the "
            "optimizer, its learning rate's schedule and regularizers must not read a loss or "
            "metric, which has no noise, nor a tensor of the step that Python code has kept. "
            f"Received: {read}, which is read. Leave it out."
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
    owned = {id(v) for v in (*model.weights, *model.optimizer.variables)}
    for variable in _of_metrics(model, batch):
        if id(variable) in owned:  # metrics may write what is theirs alone
            raise keeps_state(variable.path)
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
    unseen = part.unseen()
    if unseen is not None:
        raise ArgumentError(
            "A private step must neither keep values for other steps nor bring any in. "
            f"Received: a step with TensorFlow's operation {unseen}, which may do so. Use "
            "operations of Keras or TensorFlow without such effects."
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
