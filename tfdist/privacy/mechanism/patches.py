"""The inputs of a convolution's kernel at each position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

Tensor = Any
_SMALL_WINDOW = 96  # numbers in a window


def patches(layer: Any, inputs: Tensor) -> Tensor:
    """Returns the kernel's inputs at each position, [examples, positions, window, channels].

    Small windows are cut out by a convolution whose kernel is an identity matrix, with one
    output for each place in the window. Larger windows are gathered. Each way is the faster one
    for its sizes.

    Args:
        layer: A convolution of Keras, of any rank, depthwise or not.
        inputs: Its inputs.
    """
    inputs = tf.cast(channels_last(layer, inputs), tf.float32)
    padding = layer.padding
    if padding == "causal":
        width = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        inputs, padding = tf.pad(inputs, [[0, 0], [width, 0], [0, 0]]), "valid"
    window, channels = math.prod(layer.kernel_size), inputs.shape[-1]
    if window * channels > _SMALL_WINDOW and None not in inputs.shape[1:]:
        return _gathered(layer, inputs, padding)
    identity = tf.reshape(
        tf.eye(window * channels), [*layer.kernel_size, channels, window * channels]
    )
    windows = ops.conv(
        inputs,
        identity,
        strides=list(layer.strides),
        padding=padding,
        data_format="channels_last",
        dilation_rate=list(layer.dilation_rate),
    )
    positions = folded(windows, range(1, len(windows.shape) - 1))
    return tf.reshape(windows, [-1, positions, window, channels])


def _gathered(layer: Any, inputs: Tensor, padding: str) -> Tensor:
    """Gathers windows from inputs with static sizes."""
    pads, places = [], []
    settings = zip(layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
    for size, (kernel, stride, dilation) in zip(inputs.shape[1:-1], settings, strict=True):
        reach = (kernel - 1) * dilation + 1
        missing = 0
        if padding == "same":  # as in TensorFlow: an odd padding is longer at the end
            missing = max(0, (-(-size // stride) - 1) * stride + reach - size)
        pads.append((missing // 2, missing - missing // 2))
        starts = np.arange(0, size + missing - reach + 1, stride)
        places.append(starts[:, None] + np.arange(kernel) * dilation)
    inputs = tf.pad(inputs, [(0, 0), *pads, (0, 0)])
    numbers = np.zeros((1, 1), np.int64)
    # Row-major numbers of all positions of a window, built up axis by axis.
    for size, place in zip(inputs.shape[1:-1], places, strict=True):
        numbers = numbers[:, None, :, None] * size + place[None, :, None, :]
        numbers = numbers.reshape(numbers.shape[0] * numbers.shape[1], -1)
    flat = tf.reshape(inputs, [-1, math.prod(inputs.shape[1:-1]), inputs.shape[-1]])
    return tf.gather(flat, numbers, axis=1)


def channels_last(layer: Any, tensor: Tensor) -> Tensor:
    """Moves the channels of a convolution's inputs or outputs to the end.

    Args:
        layer: The convolution.
        tensor: Shape [examples, ...].
    """
    if layer.data_format == "channels_last":
        return tensor
    rank = len(tensor.shape)
    return tf.transpose(tensor, [0, *range(2, rank), 1])


def folded(tensor: Tensor, axes: Sequence[int]) -> Any:
    """Multiplies the sizes of axes. The result is a number if they are static.

    Args:
        tensor: A tensor of any shape.
        axes: The axes.
    """
    sizes = [tensor.shape[axis] for axis in axes]
    if None not in sizes:
        return math.prod(sizes)
    return tf.reduce_prod(tf.gather(tf.shape(tensor), list(axes)))
