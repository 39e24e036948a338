"""Per-example gradients by a kernel or a table, or by the factors of its low-rank update.

`layer.enable_lora(rank)` freezes a kernel W and trains A and B in W + (alpha / rank) A B (Hu et
al., "LoRA: Low-rank adaptation of large language models", ICLR 2022). The gradients by A and B
are products of two matrices, as the gradient by W is, but smaller ones (Yu et al.,
"Differentially private fine-tuning of language models", ICLR 2022, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.privacy.mechanism.parts import GradientPart, Lookup, Product

Tensor = Any


def is_enabled(layer: Any) -> bool:
    """Returns whether a layer trains a low-rank update of its weights.

    Args:
        layer: A `keras.Layer`.
    """
    return bool(getattr(layer, "lora_enabled", False))


def kernel_shape(layer: Any) -> tuple[int, ...]:
    """Returns the shape of a kernel. A quantized layer may store it in another shape.

    Args:
        layer: A layer with a kernel.
    """
    if not is_enabled(layer):
        return tuple(layer.kernel.shape)
    return (*layer.lora_kernel_a.shape[:-1], layer.lora_kernel_b.shape[-1])


def of_kernel(
    layer: Any,
    inputs: Tensor,
    outputs: Tensor,
    axes: tuple[Sequence[int], Sequence[int]] | None = None,
) -> list[GradientPart]:
    """Returns the gradients by a kernel, or by the factors of its low-rank update.

    Args:
        layer: A layer with a kernel whose last axis is also an axis of its outputs.
        inputs: Shape [examples, positions, p].
        outputs: Gradients by the outputs, shape [examples, positions, q].
        axes: As in `Product`.
    """
    if not is_enabled(layer):
        return [Product(layer.kernel, inputs, outputs, axes)]
    first, second, scale = _factors(layer, "kernel")
    inputs, outputs = tf.cast(inputs, tf.float32), tf.cast(outputs, tf.float32) * scale
    rank, last = second.shape
    # `leading` is the product of the outputs' axes but the last. B does not see them.
    p, leading = inputs.shape[2], outputs.shape[2] // last
    positions = _known_or(outputs.shape[1], tf.shape(outputs)[1])
    split = tf.reshape(outputs, [-1, positions * leading, last])
    # By the chain rule. For inputs x and output gradients g, the gradient by A is x^T (g B^T),
    # and that by B is (x A)^T g.
    by_first = tf.reshape(
        tf.matmul(split, second, transpose_b=True), [-1, positions, leading * rank]
    )
    axes_of_first = None
    if axes is None:
        matrix = tf.reshape(first, [p, rank])
    else:
        shape, order = axes
        axes_of_first = [*shape[:-1], rank], order
        inverse = [list(order).index(axis) for axis in range(len(order))]
        matrix = tf.reshape(tf.transpose(first, inverse), [p, leading * rank])
    hidden = tf.reshape(tf.matmul(inputs, matrix), [-1, positions * leading, rank])
    return [
        Product(layer.lora_kernel_a, inputs, by_first, axes_of_first),
        Product(layer.lora_kernel_b, hidden, split),
    ]


def of_table(layer: Any, rows: Tensor, outputs: Tensor) -> list[GradientPart]:
    """Returns the gradients by a table of embeddings, or by the factors of its update.

    Args:
        layer: A `keras.layers.Embedding`.
        rows: The numbers of the looked-up rows, int, shape [examples, positions].
        outputs: Gradients by the looked-up rows, shape [examples, positions, q].
    """
    if not is_enabled(layer):
        return [Lookup(layer.embeddings, rows, outputs)]
    first, second, scale = _factors(layer, "embeddings")
    outputs = tf.cast(outputs, tf.float32) * scale
    return [
        Lookup(layer.lora_embeddings_a, rows, tf.matmul(outputs, second, transpose_b=True)),
        Product(layer.lora_embeddings_b, tf.gather(first, rows), outputs),
    ]


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """Returns A, B and alpha / rank."""
    variables = [getattr(layer, f"lora_{name}_{letter}") for letter in "ab"]
    first, second = (tf.cast(tf.convert_to_tensor(v), tf.float32) for v in variables)
    return first, second, layer.lora_alpha / layer.lora_rank


def _known_or(size: int | None, dynamic: Tensor) -> Any:
    return dynamic if size is None else size
