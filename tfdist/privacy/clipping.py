"""The sum of per-example gradients, each clipped, by one forward and one backward pass.

Book-keeping (Bu et al., "Differentially private optimization on large model at small cost",
ICML 2023): the backward pass goes to the outputs of the layers, not to their weights. From a
layer's inputs and its outputs' gradients follow the norms of all per-example gradients, and
then their weighted sum, mostly without writing any of them out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from keras import layers

from tfdist.errors import ArgumentError
from tfdist.privacy import _layers
from tfdist.privacy.closed_forms import FORMS, Call, has_activation
from tfdist.privacy.parts import Part, Written

Tensor = Any


def clipped_sum(
    model: Any, x: Any, y: Any, sample_mask: Tensor, l2_norm_clip: float
) -> tuple[list[Tensor], Tensor]:
    """Sums the gradients of all examples, each clipped to a norm; can be traced.

    An example's gradient is that of the compiled loss on a batch of this example alone.
    Regularizers, which do not depend on the data, are left out.

    Args:
        model: A compiled, built `keras.Model`.
        x: A batch of inputs, shape [examples, ...], nested as the model takes them.
        y: Targets.
        sample_mask: Bool, shape [examples]; False for padding, which counts nothing.
        l2_norm_clip: The largest norm of an example's gradient over all variables.

    Returns:
        The sums, float32, in the order of `model.trainable_variables`; and the norm of each
        example's gradient before clipping, shape [examples], 0 where it counts nothing:
        where it is masked or not finite.

    Raises:
        ArgumentError: The model has a layer that mixes examples or draws random numbers
            within what must be computed again.

    Example:
        >>> import keras, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> x, y = np.ones((3, 4), "float32"), np.zeros((3, 1), "float32")
        >>> sums, norms = clipped_sum(model, x, y, np.array([True, True, False]), 1e-3)
        >>> [tuple(s.shape) for s in sums], float(norms[2])
        ([(4, 1), (1,)], 0.0)
    """
    parts, _ = _recorded(model, x, y, also_plain=False)
    squares = tf.add_n([part.squared_norms() for part in parts])
    counted = tf.convert_to_tensor(sample_mask) & tf.math.is_finite(squares)
    # Rounding may leave a square of almost 0 below it.
    norms = tf.sqrt(tf.maximum(tf.where(counted, squares, 0.0), 0.0))
    factors = tf.minimum(1.0, tf.math.divide_no_nan(float(l2_norm_clip), norms))
    factors = tf.where(norms > 0, factors, 1.0)
    return _sums(model, parts, tf.where(counted, factors, 0.0)), norms


def check(model: Any, x: Any, y: Any, tolerance: float = 1e-3) -> None:
    """Compares the recorded gradients, unclipped, with plain ones; for a first batch.

    A weight that is used outside its layer's `call` (tied by hand, say) would else be missed.

    Args:
        model: As in `clipped_sum`.
        x: As in `clipped_sum`.
        y: As in `clipped_sum`.
        tolerance: The largest difference, as a part of the plain gradient's norm.

    Raises:
        ArgumentError: They differ.
    """
    parts, plain = _recorded(model, x, y, also_plain=True)
    examples = tf.shape(parts[0].squared_norms())[0]
    received = _sums(model, parts, tf.ones([examples]))
    for variable, sums, expected in zip(
        model.trainable_variables, received, plain, strict=True
    ):
        difference = float(tf.norm(sums - tf.cast(expected, tf.float32)))
        if difference > tolerance * float(tf.norm(tf.cast(expected, tf.float32))) + 1e-6:
            raise ArgumentError(
                "All weights must be used by the layers that hold them, in their `call`, and "
                "no layer may mix examples. Received: a model in which the gradients by "
                f"{variable.path!r} of single examples do not add up to the batch's. Let a "
                "layer be called where its weight is used."
            )


def _sums(model: Any, parts: Sequence[Part], weights: Tensor) -> list[Tensor]:
    by_variable = {id(part.variable): part.weighted_sum(weights) for part in parts}
    return [
        by_variable[id(v)] if id(v) in by_variable else tf.zeros(v.shape)
        for v in model.trainable_variables
    ]


def _recorded(model: Any, x: Any, y: Any, *, also_plain: bool) -> tuple[list[Part], list[Any]]:
    """Runs the model forward and backward, and gives the gradients by variable."""
    units = _units(model)
    calls: dict[int, list[Call]] = {id(unit): [] for unit in units}
    tape = tf.GradientTape(watch_accessed_variables=False)
    variables = [v.value for v in model.trainable_variables] if also_plain else []
    with contextlib.ExitStack() as stack:
        for unit in units:
            stack.enter_context(_recording(unit, calls[id(unit)], tape))
        stack.enter_context(tape)
        for variable in variables:
            tape.watch(variable)
        loss = _loss(model, x, y)
    outputs = [call.outputs for made in calls.values() for call in made]
    gradients, plain = tape.gradient(
        loss, (outputs, variables), unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    remaining = iter(tf.nest.map_structure(tf.convert_to_tensor, gradients))
    parts: list[Part] = []
    for unit in units:
        made = [c._replace(gradients=next(remaining)) for c in calls[id(unit)]]
        if made:
            parts += _parts(unit, made)
    return _one_each(parts), [tf.convert_to_tensor(g) for g in plain]


def _one_each(parts: Sequence[Part]) -> list[Part]:
    """Adds up the parts of a variable that several layers use: norms of sums need the sums."""
    found: dict[int, Part] = {}
    for part in parts:
        other = found.get(id(part.variable))
        if other is not None:
            part = Written(part.variable, part.each() + other.each())
        found[id(part.variable)] = part
    return list(found.values())


def _loss(model: Any, x: Any, y: Any) -> Tensor:
    """Gives the sum over examples of the loss of each of them alone."""
    outputs = model(x, training=True)
    examples = tf.shape(tf.nest.flatten(outputs)[0])[0]
    masked = any(_layers.has_mask(output) for output in tf.nest.flatten(outputs))
    losses = [loss for loss in tf.nest.flatten(model.loss) if loss is not None]
    if not masked and all(map(_layers.is_compiled_mean, losses)):
        whole = model.compute_loss(x=x, y=y, y_pred=outputs, training=True)
        return whole * tf.cast(examples, whole.dtype)

    def alone(index: Tensor) -> Tensor:
        def row(leaf: Tensor) -> Tensor:
            mine = leaf[index : index + 1]
            if _layers.has_mask(leaf):
                mine._keras_mask = leaf._keras_mask[index : index + 1]
            return mine

        one_x, one_y = tf.nest.map_structure(
            lambda leaf: tf.convert_to_tensor(leaf)[index : index + 1], (x, y)
        )
        one_outputs = tf.nest.map_structure(row, outputs)
        loss = model.compute_loss(x=one_x, y=one_y, y_pred=one_outputs, training=True)
        return tf.cast(loss, tf.float32)

    return tf.reduce_sum(tf.map_fn(alone, tf.range(examples), fn_output_signature=tf.float32))


def _units(model: Any) -> list[Any]:
    """Finds the layers whose calls are recorded: together they hold all trainable weights."""
    found: dict[int, Any] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization) and layer.trainable:
            raise ArgumentError(
                "A private model must not mix the examples of a batch. Received: the layer "
                f"{layer.name!r} of type BatchNormalization. Use GroupNormalization."
            )

    def visit(layer: Any) -> None:
        if not layer.trainable_variables:
            return
        # These call their inner layers in a loop, where nothing can be recorded.
        whole = isinstance(layer, layers.RNN | layers.TimeDistributed)
        if whole or _layers.own_variables(layer):
            found.setdefault(id(layer), layer)
        else:
            for part in _layers.sublayers(layer):
                visit(part)

    visit(model)
    return list(found.values())


def _has_form(unit: Any) -> bool:
    return type(unit) in FORMS and _layers.is_plain(unit)


@contextlib.contextmanager
def _recording(unit: Any, calls: list[Call], tape: Any) -> Iterator[None]:
    """Notes a layer's calls, and has the tape give gradients by what they return."""
    splits = _has_form(unit) and has_activation(unit)

    def record(call: Any, *args: Any, **kwargs: Any) -> Any:
        if splits:
            with _layers.changed(unit, activation=None):
                outputs = call(*args, **kwargs)
        else:
            outputs = call(*args, **kwargs)
        # Where an input is returned as it is, the tape needs a tensor of its own.
        outputs = tf.nest.map_structure(tf.identity, outputs)
        for output in tf.nest.flatten(outputs):
            tape.watch(output)
        calls.append(Call(args, kwargs, outputs))
        return unit.activation(outputs) if splits else outputs

    with _layers.called_through(unit, record):
        yield


def _parts(unit: Any, calls: Sequence[Call]) -> list[Part]:
    parts = FORMS[type(unit)](unit, calls) if _has_form(unit) else None
    if parts is None:
        parts = _computed_again(unit, calls)
    trained = {id(v) for v in unit.trainable_variables}
    return [part for part in parts if id(part.variable) in trained]


def _computed_again(unit: Any, calls: Sequence[Call]) -> list[Part]:
    """Runs a layer without a closed form on one example after the other: exact, and slow."""
    _check_repeatable(unit)
    variables = unit.trainable_variables
    summed: list[Any] = [0.0] * len(variables)
    for call in calls:
        examples = tf.shape(tf.nest.flatten(call.outputs)[0])[0]

        def one(index: Tensor, call: Call = call) -> list[Tensor]:
            def row(leaf: Any) -> Any:
                is_batch = tf.is_tensor(leaf) and leaf.shape.rank != 0
                return leaf[index : index + 1] if is_batch else leaf

            args, kwargs, gradients = tf.nest.map_structure(
                row, (call.args, call.kwargs, call.gradients)
            )
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                for variable in variables:
                    tape.watch(variable.value)
                outputs = unit(*args, **kwargs)
            found = tape.gradient(
                outputs,
                [v.value for v in variables],
                output_gradients=gradients,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
            return [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in found]

        each = tf.map_fn(
            one,
            tf.range(examples),
            fn_output_signature=[tf.TensorSpec(v.shape, tf.float32) for v in variables],
        )
        summed = [before + more for before, more in zip(summed, each, strict=True)]
    return [Written(v, each) for v, each in zip(variables, summed, strict=True)]


def _check_repeatable(unit: Any) -> None:
    """Refuses what would give another result the second time."""
    inside = [unit, *unit._flatten_layers(include_self=False)]
    if isinstance(unit, layers.RNN):
        inside.append(unit.cell)
    random = any(
        getattr(part, name, 0)
        for part in inside
        for name in ("dropout", "recurrent_dropout", "rate", "stddev")
    )
    state = len(unit.non_trainable_variables) > len(_layers.seeds(unit))
    known = isinstance(unit, layers.RNN | layers.TimeDistributed)
    drawing = bool(_layers.seeds(unit)) and (random or not known)
    if state or drawing:
        raise ArgumentError(
            "A layer without a closed form must give the same outputs when it is called "
            f"again. Received: the layer {unit.name!r} of type {type(unit).__name__}, with "
            f"{'state' if state else 'random numbers'} of its own. Use a layer of its own for "
            "dropout, and none that mixes examples."
        )
