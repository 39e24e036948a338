"""Per-example gradients of layers, computed from their inputs and their outputs' gradients.

Each function takes a layer and its recorded calls, and returns a `GradientPart` for each of the
layer's variables. Several calls of a shared layer are concatenated along the positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import layers, ops

from tfdist._keras import layers as keras_layers
from tfdist.privacy.mechanism import lora, recurrent
from tfdist.privacy.mechanism.lora import of_kernel, of_table
from tfdist.privacy.mechanism.parts import GradientPart, Written
from tfdist.privacy.mechanism.patches import channels_last, folded, patches
from tfdist.privacy.mechanism.recurrent import of_recurrent

Tensor = Any
Parts = list[GradientPart]


class RecordedCall(NamedTuple):
    """One call of a layer.

    Attributes:
        args: Positional arguments.
        kwargs: Named arguments.
        outputs: The outputs, before the layer's activation if it has one.
        normalized: The outputs of a normalization before scale and offset, if recorded.
        gradients: The gradients of the loss by `outputs`, in the same structure.
        seeds: Pairs of a state of random numbers and its value before the call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    normalized: Any = None
    gradients: Any = None
    seeds: Sequence[tuple[Any, Tensor]] = ()

    @property
    def inputs(self) -> Tensor:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def argument(self, place: int, name: str) -> Any:
        """Returns a positional or named argument, or None if it was not passed.

        Args:
            place: Its place among the positional arguments.
            name: Its name.
        """
        return self.args[place] if len(self.args) > place else self.kwargs.get(name)


def _dense(layer: Any, calls: Sequence[RecordedCall]) -> Parts:
    inputs = tf.concat([_positions(call.inputs) for call in calls], 1)
    outputs = tf.concat([_positions(call.gradients) for call in calls], 1)
    parts = of_kernel(layer, inputs, outputs)
    if layer.bias is not None:
        parts.append(Written(layer.bias, tf.reduce_sum(tf.cast(outputs, tf.float32), 1)))
    return parts


def _einsum_dense(layer: Any, calls: Sequence[RecordedCall]) -> Parts | None:
    inputs, outputs = [], []
    for call in calls:
        labels = _einsum_labels(layer.equation, len(call.inputs.shape))
        if labels is None:
            return None
        input_axes, kernel, output_axes = labels
        positions = [c for c in input_axes[1:] if c in output_axes]
        contracted = [c for c in kernel if c in input_axes]
        produced = [c for c in kernel if c in output_axes]
        if lora.is_enabled(layer) and kernel[-1] not in output_axes:
            return None
        sizes = dict(zip(kernel, lora.kernel_shape(layer), strict=True))
        p, q = (math.prod(sizes[c] for c in part) for part in (contracted, produced))
        order = [input_axes.index(c) for c in (input_axes[0], *positions, *contracted)]
        count = folded(call.inputs, [input_axes.index(c) for c in positions])
        inputs.append(tf.reshape(tf.transpose(call.inputs, order), [-1, count, p]))
        order = [output_axes.index(c) for c in (input_axes[0], *positions, *produced)]
        outputs.append(tf.reshape(tf.transpose(call.gradients, order), [-1, count, q]))
    order = [(contracted + produced).index(c) for c in kernel]
    axes = [sizes[c] for c in contracted + produced], order
    joined = tf.concat(inputs, 1), tf.concat(outputs, 1)
    parts = of_kernel(layer, *joined, axes)
    if layer.bias is not None:
        shape = layer.bias.shape
        summed = sum(_sum_to(call.gradients, shape) for call in calls)
        parts.append(Written(layer.bias, summed))
    return parts


def _einsum_labels(equation: str, rank: int) -> tuple[list[str], list[str], list[str]] | None:
    """Splits an equation into labels of axes, or returns None if the closed form does not hold.

    The form holds for a plain matrix product: each axis of the kernel is either contracted with
    the inputs or produced in the outputs, and the first axis is that of examples.
    """
    sides, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = sides.split(",")
    if "..." in kernel:
        return None
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    ellipsis = "".join(spare[: rank - len(inputs.replace("...", ""))])
    inputs, outputs = inputs.replace("...", ellipsis), outputs.replace("...", ellipsis)
    labels = [list(part) for part in (inputs, kernel, outputs)]
    are_distinct = all(len(set(part)) == len(part) for part in labels)
    begins_with_examples = inputs[0] == outputs[0] and inputs[0] not in kernel
    has_no_diagonal = all((c in inputs) != (c in outputs) for c in kernel)
    has_no_sum = all(c in kernel or c in outputs for c in inputs)
    has_no_broadcast = all(c in kernel or c in inputs for c in outputs)
    if (
        are_distinct
        and begins_with_examples
        and has_no_diagonal
        and has_no_sum
        and has_no_broadcast
    ):
        return labels[0], labels[1], labels[2]
    return None


def _embedding(layer: Any, calls: Sequence[RecordedCall]) -> Parts:
    rows, outputs = [], []
    for call in calls:
        ids = tf.cast(call.inputs, tf.int32)
        count = folded(ids, range(1, len(ids.shape)))
        ids = tf.where(ids < 0, ids + layer.input_dim, ids)  # as in `keras.ops.take`
        rows.append(tf.reshape(ids, [-1, count]))
        outputs.append(tf.reshape(call.gradients, [-1, count, layer.output_dim]))
    return of_table(layer, tf.concat(rows, 1), tf.concat(outputs, 1))


def _conv(layer: Any, calls: Sequence[RecordedCall]) -> Parts | None:
    if lora.is_enabled(layer) and layer.groups != 1:
        return None
    # At each position, a convolution multiplies a window of its inputs by the kernel. So it is
    # a dense layer on windows.
    windows = tf.concat([patches(layer, call.inputs) for call in calls], 1)
    outputs = tf.concat([_positions(channels_last(layer, c.gradients)) for c in calls], 1)
    channels = windows.shape[-1]
    size = math.prod(layer.kernel_size)
    parts: Parts
    if layer.groups == 1:
        flat = tf.reshape(windows, [-1, windows.shape[1] or _length(windows), size * channels])
        parts = of_kernel(layer, flat, outputs)
    else:
        groups = layer.groups
        inputs = tf.reshape(windows, [-1, _length(windows), size, groups, channels // groups])
        by_group = tf.reshape(outputs, [-1, _length(outputs), groups, layer.filters // groups])
        # A group of channels has its own kernel, so the gradient is not a single product.
        gradients = tf.einsum("btwgi,btgo->bwigo", inputs, by_group)
        parts = [Written(layer.kernel, _shaped(gradients, layer.kernel.shape))]
    if layer.use_bias:
        parts.append(Written(layer.bias, tf.reduce_sum(tf.cast(outputs, tf.float32), 1)))
    return parts


def _depthwise_conv(layer: Any, calls: Sequence[RecordedCall]) -> Parts:
    windows = tf.concat([patches(layer, call.inputs) for call in calls], 1)
    outputs = tf.concat([_positions(channels_last(layer, c.gradients)) for c in calls], 1)
    shape = [-1, _length(outputs), windows.shape[-1], layer.depth_multiplier]
    by_channel = tf.cast(tf.reshape(outputs, shape), tf.float32)
    gradients = tf.einsum("btwc,btcm->bwcm", tf.cast(windows, tf.float32), by_channel)
    parts: Parts = [Written(layer.kernel, _shaped(gradients, layer.kernel.shape))]
    if layer.use_bias:
        parts.append(Written(layer.bias, tf.reduce_sum(tf.cast(outputs, tf.float32), 1)))
    return parts


def _normalization(layer: Any, calls: Sequence[RecordedCall]) -> Parts | None:
    """Returns the gradients by the scale and the offset of a normalization."""
    gamma, beta = _scale_and_offset(layer)
    by_gamma, by_beta = [], []
    for call in calls:
        rank = len(call.inputs.shape)
        axes = _normalized_axes(layer, rank)
        # The sums below need the axes in order. With the axis of examples among them, an output
        # would depend on other examples.
        if axes != sorted(axes) or 0 in axes:
            return None
        summed = [a for a in range(1, rank) if a not in axes]
        gradients = tf.cast(call.gradients, tf.float32)
        by_beta.append(tf.reduce_sum(gradients, summed))
        if gamma is not None:
            normalized = call.normalized
            if normalized is None:
                with keras_layers.with_attributes(layer, **_UNSCALED[type(layer)]):
                    normalized = tf.cast(layer.call(call.inputs), tf.float32)
            by_gamma.append(tf.reduce_sum(gradients * normalized, summed))
    parts: Parts = []
    for variable, gradients in ((gamma, by_gamma), (beta, by_beta)):
        if variable is not None:
            parts.append(Written(variable, _shaped(sum(gradients), variable.shape)))
    return parts


def scaled(layer: Any, normalized: Tensor) -> Tensor:
    """Applies a normalization's scale and offset.

    Args:
        layer: A normalization with `left_out`.
        normalized: The outputs of its `call` with the attributes of `left_out`.
    """
    rank = len(normalized.shape)
    axes = _normalized_axes(layer, rank)
    shape = [normalized.shape[a] if a in axes else 1 for a in range(rank)]
    gamma, beta = _scale_and_offset(layer)
    if gamma is not None:
        normalized *= ops.reshape(gamma, shape)
    return normalized if beta is None else normalized + ops.reshape(beta, shape)


def _scale_and_offset(layer: Any) -> tuple[Any, Any]:
    if isinstance(layer, layers.RMSNormalization):
        return layer.scale, None
    return layer.gamma, layer.beta


def _normalized_axes(layer: Any, rank: int) -> list[int]:
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    return [axis % rank for axis in axes]


def _positions(tensor: Tensor) -> Tensor:
    """Folds the axes between the first and the last into one."""
    count = folded(tensor, range(1, len(tensor.shape) - 1))
    return tf.reshape(tensor, [-1, count, tensor.shape[-1]])


def _length(tensor: Tensor) -> Any:
    return folded(tensor, [1])


def _shaped(each: Tensor, shape: Sequence[int]) -> Tensor:
    return tf.reshape(each, [-1, *shape])


def _sum_to(gradients: Tensor, shape: Sequence[int]) -> Tensor:
    """Sums each example's gradients to the shape of a variable that was broadcast."""
    gradients = tf.cast(gradients, tf.float32)
    extra = len(gradients.shape) - 1 - len(shape)
    summed = tf.reduce_sum(gradients, list(range(1, 1 + extra)))
    broadcast = [axis + 1 for axis, size in enumerate(shape) if size == 1]
    return tf.reduce_sum(summed, broadcast, keepdims=True) if broadcast else summed


FORMS: dict[type, Callable[[Any, Sequence[RecordedCall]], Parts | None]] = {
    layers.Dense: _dense,
    layers.EinsumDense: _einsum_dense,
    layers.Embedding: _embedding,
    layers.Conv1D: _conv,
    layers.Conv2D: _conv,
    layers.Conv3D: _conv,
    layers.DepthwiseConv1D: _depthwise_conv,
    layers.DepthwiseConv2D: _depthwise_conv,
    layers.LayerNormalization: _normalization,
    layers.GroupNormalization: _normalization,
    layers.RMSNormalization: _normalization,
    layers.LSTM: of_recurrent,
    layers.GRU: of_recurrent,
    layers.SimpleRNN: of_recurrent,
    layers.RNN: of_recurrent,
}
"""The closed forms by class of layer. A form returns None if it does not hold for a call."""


def has_form(layer: Any) -> bool:
    """Returns whether a layer has a closed form.

    Args:
        layer: A `keras.Layer`.
    """
    if type(layer) not in FORMS or not keras_layers.is_plain(layer):
        return False
    return recurrent.has_form(layer) if isinstance(layer, layers.RNN) else True


# The attributes with which a layer's `call` normalizes without scale and offset.
_UNSCALED: dict[type, dict[str, Any]] = {
    layers.LayerNormalization: {"gamma": None, "beta": None},
    layers.GroupNormalization: {"scale": False, "center": False},
    layers.RMSNormalization: {"scale": None},
}


def has_activation(layer: Any) -> bool:
    """Returns whether a layer with a closed form applies an activation.

    Args:
        layer: A `keras.Layer`.
    """
    activation = vars(layer).get("activation")  # a recurrent layer's is its cell's
    return activation is not None and activation is not keras.activations.linear


def left_out(layer: Any) -> dict[str, Any]:
    """Returns the attributes with which a normalization's `call` neither scales nor offsets.

    Args:
        layer: A `keras.Layer`.

    Returns:
        The attributes and their values. They are empty for other layers, and for a layer that
        rounds between normalizing and scaling.
    """
    return _UNSCALED.get(type(layer), {}) if layer.compute_dtype == "float32" else {}
