"""The sum of per-example gradients, each clipped, by one forward and one backward pass.

Book-keeping (Bu et al., "Differentially private optimization on large model at small cost",
ICML 2023): the backward pass goes to the outputs of the layers, not to their weights. From a
layer's inputs and its outputs' gradients follow the norms of all per-example gradients, and
then their weighted sum, mostly without writing any of them out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from keras import layers

from tfdist import _keras
from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism.clipping_groups import Alone, ClippingGroups
from tfdist.privacy.mechanism.closed_forms import (
    FORMS,
    LayerCall,
    has_activation,
    has_form,
    left_out,
    scaled,
)
from tfdist.privacy.mechanism.example_losses import is_mean, summed_loss
from tfdist.privacy.mechanism.folding import Foldings, foldings, found_without_batch
from tfdist.privacy.mechanism.one_by_one import computed_again
from tfdist.privacy.mechanism.parts import GradientPart, Written
from tfdist.privacy.mechanism.rounding import gamma
from tfdist.privacy.mechanism.tied import found_tied, of_tied, tied

Tensor = Any
_ALONE = Alone()


class Clipped(NamedTuple):
    """What one pass over some examples gives.

    Attributes:
        sums: Of clipped gradients, float32, in the order of `model.trainable_variables`.
        norms: Of each unit's gradient before clipping, shape [units], 0 where it counts
            nothing: where it is masked or not finite. Rounded up, by so much that no unit
            adds more than the clipping norm. An example is a unit if nothing else was said.
        votes: 1/2 for each that counts and was not clipped, less 1/2 for each that was.
        outputs: The model's.
    """

    sums: list[Tensor]
    norms: Tensor
    votes: Tensor
    outputs: Any


def clipped_sum(
    model: Any,
    x: Any,
    y: Any,
    sample_mask: Tensor,
    l2_norm_clip: Any,
    sample_weight: Any = None,
    per_layer: bool = False,
    together: ClippingGroups = _ALONE,
) -> Clipped:
    """Sums the gradients of all examples, each clipped to a norm; can be traced.

    An example's gradient is that of the compiled loss on a batch of this example alone.
    Regularizers of weights, which do not depend on the data, are left out.

    Args:
        model: A compiled, built `keras.Model`.
        x: A batch of inputs, shape [examples, ...], nested as the model takes them.
        y: Targets.
        sample_mask: Bool, shape [examples]; False for padding, which counts nothing.
        l2_norm_clip: The largest norm of an example's gradient over all variables, a float or
            a scalar tensor.
        sample_weight: By which losses are multiplied, before clipping, as Keras has them.
        per_layer: Whether each of L layers with weights is clipped by itself, to
            `l2_norm_clip` / sqrt(L), so that the norm over all is bounded just the same.
        together: Examples whose gradients are added up, or averaged, before they are clipped.

    Raises:
        ArgumentError: The model has a layer that mixes examples or draws random numbers
            within what must be computed again.

    Example:
        >>> import keras, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> x, y = np.ones((3, 4), "float32"), np.zeros((3, 1), "float32")
        >>> clipped = clipped_sum(model, x, y, np.array([True, True, False]), 1e-3)
        >>> [tuple(s.shape) for s in clipped.sums], float(clipped.norms[2])
        ([(4, 1), (1,)], 0.0)
    """
    parts, _, outputs = recorded(model, x, y, sample_weight)
    groups = _by_layer(model, parts) if per_layer else [parts]
    squares = [
        together.scale**2 * tf.add_n([part.squared_norms(together) for part in group])
        for group in groups
    ]
    mask = together.all_of(tf.convert_to_tensor(sample_mask))
    finite = tf.math.is_finite(tf.add_n(squares))
    counted = mask & finite
    bound = l2_norm_clip / math.sqrt(len(groups))
    factors: dict[int, Tensor] = {}
    for group, of_group in zip(groups, squares, strict=True):
        norms = _norms(of_group, counted)
        norms *= 1 + gamma(
            len(group) + 8
        )  # sums, roots, quotients and products are rounded too
        factor = tf.where(norms > 0, tf.minimum(1.0, tf.math.divide_no_nan(bound, norms)), 1.0)
        factor = tf.where(counted, factor * together.scale, 0.0)
        factors |= {id(part.variable): factor for part in group}
    norms = _norms(tf.add_n(squares), counted)
    votes = tf.where(counted, tf.where(norms <= l2_norm_clip, 0.5, -0.5), 0.0)
    sums = weighted_sums(model, parts, factors, tf.reduce_all(finite), together)
    return Clipped(sums, norms, tf.reduce_sum(votes), outputs)


def _norms(squares: Tensor, counted: Tensor) -> Tensor:
    # Rounding may leave a square of almost 0 below it.
    return tf.sqrt(tf.maximum(tf.where(counted, squares, 0.0), 0.0))


def _by_layer(model: Any, parts: Sequence[GradientPart]) -> list[list[GradientPart]]:
    """Groups parts by the layer that has their variable; a shared one by the first."""
    layer_of: dict[int, int] = {}
    for number, unit in enumerate(_units(model)):
        for variable in unit.trainable_variables:
            layer_of.setdefault(id(variable), number)
    groups: dict[int, list[GradientPart]] = {}
    for part in parts:
        groups.setdefault(layer_of[id(part.variable)], []).append(part)
    return list(groups.values())


def computed_alone(model: Any) -> list[str]:
    """Names what has no closed form and is computed for one example after the other.

    Args:
        model: A compiled, built `keras.Model`.

    Returns:
        Layers with their class, what `check` has found (weights that are used outside their
        layers, layers that are called without the batch), and "the loss".
    """
    found = [f"{u.name} ({type(u).__name__})" for u in _units(model) if not has_form(u)]
    found += [f"{path}, used outside its layer" for path in found_tied(model)]
    found += [f"{name}, called without the batch" for name in found_without_batch(model)]
    return found if is_mean(model, None, []) else [*found, "the loss"]


def weighted_sums(
    model: Any,
    parts: Sequence[GradientPart],
    weights: Mapping[int, Tensor],
    all_finite: Tensor,
    together: ClippingGroups = _ALONE,
) -> list[Tensor]:
    """Sums parts over examples, each weighed as its variable's id says."""
    by_variable = {
        id(part.variable): part.weighted_sum(weights[id(part.variable)], all_finite, together)
        for part in parts
    }
    return [
        by_variable[id(v)] if id(v) in by_variable else tf.zeros(v.shape)
        for v in model.trainable_variables
    ]


def recorded(
    model: Any,
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    also_plain: bool = False,
    training: bool = True,
) -> tuple[list[GradientPart], list[Any], Any]:
    """Runs the model forward and backward, and gives the gradients by variable."""
    units = _units(model)
    found = foldings(model, units, x)
    whole = {id(layer): layer for layer in found.around.values() if layer is not None}
    units_and_whole = [*units, *whole.values()]
    calls: dict[int, list[LayerCall]] = {id(unit): [] for unit in units_and_whole}
    by_hand = tied(model, units, lambda outs: summed_loss(model, x, y, sample_weight, outs), x)
    has = {id(v) for v in by_hand}
    by_hand += [v for v in found.without_batch(units, None) if id(v) not in has]
    seeds = [(v, tf.identity(v.value)) for v in keras_layers.seeds(model)] if by_hand else []
    tape = tf.GradientTape(watch_accessed_variables=False)
    variables = [v.value for v in model.trainable_variables] if also_plain else []
    with tape:
        for variable in variables:
            tape.watch(variable)
        # A loss that calls layers does so for one example after the other: see `tied`.
        with contextlib.ExitStack() as stack:
            for unit in units_and_whole:
                stack.enter_context(_recording(unit, calls[id(unit)], tape))
            outputs = model(x, training=training)
        loss = summed_loss(model, x, y, sample_weight, outputs)
    recorded = [call.outputs for made in calls.values() for call in made]
    gradients, plain = tape.gradient(
        loss, (recorded, variables), unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    remaining = iter(tf.nest.map_structure(tf.convert_to_tensor, gradients))
    parts: list[GradientPart] = []
    for unit in units_and_whole:
        made = [c._replace(gradients=next(remaining)) for c in calls[id(unit)]]
        if id(unit) in whole:
            parts += computed_again(unit, made, found.without_batch(units, unit))
        elif made and id(unit) not in found.around:
            parts += _parts(unit, made, found)
    if by_hand:
        again = {id(v) for v in by_hand}
        parts = [part for part in parts if id(part.variable) not in again]
        parts += of_tied(model, by_hand, (x, y, sample_weight), training, seeds)
    return _one_each(parts), [tf.convert_to_tensor(g) for g in plain], outputs


def _one_each(parts: Sequence[GradientPart]) -> list[GradientPart]:
    """Adds up the parts of a variable that several layers use: norms of sums need the sums."""
    found: dict[int, GradientPart] = {}
    for part in parts:
        other = found.get(id(part.variable))
        if other is not None:
            part = Written(part.variable, part.each() + other.each())
        found[id(part.variable)] = part
    return list(found.values())


def _units(model: Any) -> list[Any]:
    """Finds the layers whose calls are recorded: together they hold all trainable weights."""
    found: dict[int, Any] = {}
    for layer in _keras.layers_of(model):
        if isinstance(layer, layers.BatchNormalization) and layer.trainable:
            raise ArgumentError(
                "A private model must not mix the examples of a batch. Received: the layer "
                f"{layer.name!r} of type BatchNormalization. Use GroupNormalization."
            )
        if isinstance(layer, layers.SpectralNormalization) and layer.trainable:
            raise ArgumentError(
                "A layer must not rewrite weights when it is called: a step may call it once, "
                "or for each piece of a batch of which the examples are secret. Received: the "
                f"layer {layer.name!r} of type SpectralNormalization. Train what it wraps "
                "with a `kernel_constraint`, which is applied once a step."
            )

    def visit(layer: Any) -> None:
        if not layer.trainable_variables:
            return
        # These call their inner layers in a loop, where nothing can be recorded.
        whole = isinstance(layer, layers.RNN | layers.TimeDistributed)
        if whole or keras_layers.own_variables(layer):
            found.setdefault(id(layer), layer)
        else:
            for part in keras_layers.sublayers(layer):
                visit(part)

    visit(model)
    return list(found.values())


@contextlib.contextmanager
def _recording(unit: Any, calls: list[LayerCall], tape: Any) -> Iterator[None]:
    """Notes a layer's calls, and has the tape give gradients by what they return."""
    in_closed_form = has_form(unit)
    activates = in_closed_form and has_activation(unit)
    unscaled = left_out(unit) if in_closed_form else {}
    apart = {"activation": None} if activates else unscaled
    seeds = keras_layers.seeds(unit)

    def record(call: Any, *args: Any, **kwargs: Any) -> Any:
        drawn = [(v, tf.identity(v.value)) for v in seeds]
        with keras_layers.changed(unit, **apart):
            outputs = call(*args, **kwargs)
        normalized = None
        if unscaled:
            normalized, outputs = outputs, scaled(unit, outputs)
        # Where an input is returned as it is, the tape needs a tensor of its own.
        outputs = tf.nest.map_structure(tf.identity, outputs)
        for output in tf.nest.flatten(outputs):
            tape.watch(output)
        calls.append(LayerCall(args, kwargs, outputs, normalized, seeds=drawn))
        return unit.activation(outputs) if activates else outputs

    with keras_layers.called_through(unit, record):
        yield


def _parts(unit: Any, calls: Sequence[LayerCall], found: Foldings) -> list[GradientPart]:
    trained = {id(v) for v in unit.trainable_variables}
    by_rows: dict[int, list[LayerCall]] = {}
    for number, call in enumerate(calls):
        by_rows.setdefault(found.of(unit, number), []).append(call)
    parts: list[GradientPart] = []
    for rows, some in by_rows.items():
        made = FORMS[type(unit)](unit, some) if has_form(unit) else None
        if made is None:
            parts += computed_again(unit, some, unit.trainable_variables, rows)
        else:
            parts += [part if rows == 1 else part.folded(rows) for part in made]
    return [part for part in parts if id(part.variable) in trained]
