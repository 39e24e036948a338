"""The sum of per-example gradients, each clipped, by one forward and one backward pass.

The method is book-keeping (Bu et al., "Differentially private optimization on large model at
small cost", ICML 2023). The backward pass ends at the outputs of the layers, not at their
weights. A layer's inputs and its outputs' gradients determine the norms of all per-example
gradients, and then their weighted sum, mostly without computing any of the gradients.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from keras import layers

from tfdist import _keras
from tfdist._keras import layers as keras_layers
from tfdist.errors import ArgumentError
from tfdist.privacy.mechanism.clipping_groups import Alone, ClippingGroups
from tfdist.privacy.mechanism.closed_forms import (
    FORMS,
    RecordedCall,
    has_activation,
    has_form,
    left_out,
    scaled,
)
from tfdist.privacy.mechanism.example_losses import is_mean, summed_loss
from tfdist.privacy.mechanism.folding import Foldings, foldings, found_without_batch
from tfdist.privacy.mechanism.one_by_one import computed_again
from tfdist.privacy.mechanism.parts import GradientPart, Written, weighted_sums
from tfdist.privacy.mechanism.rounding import gamma
from tfdist.privacy.mechanism.tied import found_tied, of_tied, tied

Tensor = Any
_ALONE = Alone()


class Clipped(NamedTuple):
    """The result of a pass over some examples.

    A unit is the set of rows that is clipped together: an example, with its copies, or a user.

    Attributes:
        sums: The sums of clipped gradients, float32, in the order of
            `model.trainable_variables`.
        norms: The norm of each unit's gradient before clipping, shape [units]. It is 0 for
            units that are masked or not finite. It is rounded up, so that no unit adds more
            than the clipping norm.
        votes: The number of units that count and were not clipped, minus the number of units
            that were clipped, divided by 2.
        outputs: The outputs of the model.
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
    grouping: ClippingGroups = _ALONE,
) -> Clipped:
    """Sums the gradients of all examples, each clipped to a norm. It can be traced.

    An example's gradient is that of the compiled loss on a batch of this example alone.
    Regularizers of weights are left out, since they do not depend on the data.

    Args:
        model: A compiled, built `keras.Model`.
        x: A batch of inputs, shape [examples, ...], nested as the model takes them.
        y: Targets.
        sample_mask: Bool, shape [examples]. False for padding, which does not count.
        l2_norm_clip: The largest norm of an example's gradient over all variables, a float or
            a scalar tensor.
        sample_weight: The sample weights of Keras. Losses are multiplied by them before
            clipping.
        per_layer: Whether each of L layers with weights is clipped separately, to
            `l2_norm_clip` / sqrt(L). The norm over all layers then has the same bound.
        grouping: The rows whose gradients are summed, or averaged, before they are clipped.

    Raises:
        ArgumentError: The model has a layer that mixes examples, or a layer without a closed
            form that draws random numbers.

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
        grouping.scale**2 * tf.add_n([part.squared_norms(grouping) for part in group])
        for group in groups
    ]
    mask = grouping.all_of(tf.convert_to_tensor(sample_mask))
    finite = tf.math.is_finite(tf.add_n(squares))
    counts = mask & finite
    bound = l2_norm_clip / math.sqrt(len(groups))
    factors: dict[int, Tensor] = {}
    for group, of_group in zip(groups, squares, strict=True):
        norms = _norms(of_group, counts)
        # The sum over parts, the root, the quotient and the products below are rounded too.
        norms *= 1 + gamma(len(group) + 8)
        factor = tf.where(norms > 0, tf.minimum(1.0, tf.math.divide_no_nan(bound, norms)), 1.0)
        factor = tf.where(counts, factor * grouping.scale, 0.0)
        factors |= {id(part.variable): factor for part in group}
    norms = _norms(tf.add_n(squares), counts)
    votes = tf.where(counts, tf.where(norms <= l2_norm_clip, 0.5, -0.5), 0.0)
    (sums,) = weighted_sums(model, parts, [factors], tf.reduce_all(finite), grouping)
    return Clipped(sums, norms, tf.reduce_sum(votes), outputs)


def _norms(squares: Tensor, counts: Tensor) -> Tensor:
    # Rounding may make a square of almost 0 negative.
    return tf.sqrt(tf.maximum(tf.where(counts, squares, 0.0), 0.0))


def _by_layer(model: Any, parts: Sequence[GradientPart]) -> list[list[GradientPart]]:
    """Groups parts by the layer of their variable. A shared variable belongs to the first."""
    layer_of: dict[int, int] = {}
    for number, unit in enumerate(_units(model)):
        for variable in unit.trainable_variables:
            layer_of.setdefault(id(variable), number)
    groups: dict[int, list[GradientPart]] = {}
    for part in parts:
        groups.setdefault(layer_of[id(part.variable)], []).append(part)
    return list(groups.values())


def computed_alone(model: Any) -> list[str]:
    """Lists the parts of a model that are computed for one example after the other.

    Args:
        model: A compiled, built `keras.Model`.

    Returns:
        Layers without a closed form, with their class; weights that are used outside their
        layers and layers that are called without the batch, as far as `independence.check` has
        found them; and "the loss" if it is not a mean over examples.
    """
    names = [f"{u.name} ({type(u).__name__})" for u in _units(model) if not has_form(u)]
    names += [f"{path}, used outside its layer" for path in found_tied(model)]
    names += [f"{name}, called without the batch" for name in found_without_batch(model)]
    return names if is_mean(model, None, []) else [*names, "the loss"]


def recorded(
    model: Any,
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    also_plain: bool = False,
    training: bool = True,
) -> tuple[list[GradientPart], list[Any], Any]:
    """Runs the model forward and backward, and computes the gradients of all examples.

    Args:
        model: A compiled, built `keras.Model`.
        x: As in `clipped_sum`.
        y: As in `clipped_sum`.
        sample_weight: As in `clipped_sum`.
        also_plain: Whether the gradients of the summed loss are computed too.
        training: Whether the model runs in training mode.

    Returns:
        The per-example gradients by variable, the plain gradients of the summed loss (none
        without `also_plain`), and the model's outputs.
    """
    units = _units(model)
    folding = foldings(model, units, x)
    # A layer that is called without the batch has no rows of examples. So the layer around it
    # is recorded, and runs again.
    enclosing = {id(layer): layer for layer in folding.around.values() if layer is not None}
    recorded_layers = [*units, *enclosing.values()]
    calls: dict[int, list[RecordedCall]] = {id(layer): [] for layer in recorded_layers}
    by_example = tied(
        model, units, lambda outs: summed_loss(model, x, y, sample_weight, outs), x
    )
    tied_ids = {id(v) for v in by_example}
    by_example += [v for v in folding.without_batch(units, None) if id(v) not in tied_ids]
    # Random numbers of a second pass must be those of the first one, so seeds are kept.
    seeds = [(v, tf.identity(v.value)) for v in keras_layers.seeds(model)] if by_example else []
    tape = tf.GradientTape(watch_accessed_variables=False)
    variables = [v.value for v in model.trainable_variables] if also_plain else []
    with tape:
        for variable in variables:
            tape.watch(variable)
        # The loss is computed outside the recording. A loss that calls layers calls them for
        # one example after the other, and `tied` computes these gradients.
        with contextlib.ExitStack() as stack:
            for layer in recorded_layers:
                stack.enter_context(_recording(layer, calls[id(layer)], tape))
            outputs = model(x, training=training)
        loss = summed_loss(model, x, y, sample_weight, outputs)
    layer_outputs = [call.outputs for of_layer in calls.values() for call in of_layer]
    gradients, plain = tape.gradient(
        loss, (layer_outputs, variables), unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    remaining = iter(tf.nest.map_structure(tf.convert_to_tensor, gradients))
    parts: list[GradientPart] = []
    for layer in recorded_layers:
        of_layer = [c._replace(gradients=next(remaining)) for c in calls[id(layer)]]
        if id(layer) in enclosing:
            parts += computed_again(layer, of_layer, folding.without_batch(units, layer))
        elif of_layer and id(layer) not in folding.around:
            parts += _parts(layer, of_layer, folding)
    if by_example:
        # The recorded calls are not all uses of these weights, so their parts are replaced.
        replaced = {id(v) for v in by_example}
        parts = [part for part in parts if id(part.variable) not in replaced]
        parts += of_tied(model, by_example, (x, y, sample_weight), training, seeds)
    return _joined_by_variable(parts), [tf.convert_to_tensor(g) for g in plain], outputs


def _joined_by_variable(parts: Sequence[GradientPart]) -> list[GradientPart]:
    """Adds up the parts of a variable that several layers use.

    The norm of a sum does not follow from the norms of its terms, so the gradients of such a
    variable are written out.
    """
    by_variable: dict[int, GradientPart] = {}
    for part in parts:
        earlier_part = by_variable.get(id(part.variable))
        if earlier_part is not None:
            part = Written(part.variable, part.each() + earlier_part.each())
        by_variable[id(part.variable)] = part
    return list(by_variable.values())


def _units(model: Any) -> list[Any]:
    """Finds the layers whose calls are recorded. Together they hold all trainable weights."""
    units: dict[int, Any] = {}
    for layer in _keras.layers_of(model):
        if isinstance(layer, layers.BatchNormalization) and layer.trainable:
            raise ArgumentError(
                "A private model must not mix the examples of a batch. Received: the layer "
                f"{layer.name!r} of type BatchNormalization. Use GroupNormalization."
            )
        if isinstance(layer, layers.SpectralNormalization) and layer.trainable:
            raise ArgumentError(
                "A private model must not have a layer that changes its weights when it is "
                "called: the number of calls in a step may depend on the drawn examples. "
                f"Received: the layer {layer.name!r} of type SpectralNormalization. Train the "
                "wrapped layer with a `kernel_constraint` instead, which is applied once a "
                "step."
            )

    def visit(layer: Any) -> None:
        if not layer.trainable_variables:
            return
        # These layers call inner layers in a loop, whose calls cannot be recorded.
        has_loop = isinstance(layer, layers.RNN | layers.TimeDistributed)
        if has_loop or keras_layers.own_variables(layer):
            units.setdefault(id(layer), layer)
        else:
            for part in keras_layers.sublayers(layer):
                visit(part)

    visit(model)
    return list(units.values())


@contextlib.contextmanager
def _recording(unit: Any, calls: list[RecordedCall], tape: Any) -> Iterator[None]:
    """Records a layer's calls, and makes the tape watch their outputs.

    The activation of a layer with a closed form, and the scale and offset of a normalization,
    are applied here instead of in the layer, so that the tape watches the values before them.
    """
    in_closed_form = has_form(unit)
    activates = in_closed_form and has_activation(unit)
    unscaled = left_out(unit) if in_closed_form else {}
    overridden = {"activation": None} if activates else unscaled
    seed_variables = keras_layers.seeds(unit)

    def record(call: Any, *args: Any, **kwargs: Any) -> Any:
        seeds = [(v, tf.identity(v.value)) for v in seed_variables]
        with keras_layers.with_attributes(unit, **overridden):
            outputs = call(*args, **kwargs)
        normalized = None
        if unscaled:
            normalized, outputs = outputs, scaled(unit, outputs)
        # A layer may return its input. The tape must watch the output alone.
        outputs = tf.nest.map_structure(tf.identity, outputs)
        for output in tf.nest.flatten(outputs):
            tape.watch(output)
        calls.append(RecordedCall(args, kwargs, outputs, normalized, seeds=seeds))
        return unit.activation(outputs) if activates else outputs

    with keras_layers.called_through(unit, record):
        yield


def _parts(unit: Any, calls: Sequence[RecordedCall], folding: Foldings) -> list[GradientPart]:
    """Computes the gradients of a layer from its recorded calls."""
    trained = {id(v) for v in unit.trainable_variables}
    calls_by_rows: dict[int, list[RecordedCall]] = {}
    for number, call in enumerate(calls):
        calls_by_rows.setdefault(folding.of(unit, number), []).append(call)
    parts: list[GradientPart] = []
    for rows, calls_of_rows in calls_by_rows.items():
        closed = FORMS[type(unit)](unit, calls_of_rows) if has_form(unit) else None
        if closed is None:
            parts += computed_again(unit, calls_of_rows, unit.trainable_variables, rows)
        else:
            parts += [part if rows == 1 else part.folded(rows) for part in closed]
    return [part for part in parts if id(part.variable) in trained]
