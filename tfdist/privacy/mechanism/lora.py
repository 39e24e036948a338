"""Per-example gradients by a kernel or a table, or by the two factors of its low-rank change.

`layer.enable_lora(rank)` freezes a kernel W and trains A and B of W + (alpha / rank) A B (Hu et
al., "LoRA: Low-rank adaptation of large language models", ICLR 2022). The gradients by A and B
are products as that by W is, of fewer numbers (Yu et al., "Differentially private fine-tuning
of language models", ICLR 2022, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdist.privacy.mechanism.parts import GradientPart, Lookup, Product

Tensor = Any


def is_enabled(layer: Any) -> bool:
    """Tells whether a layer trains a low-rank change of its weights.

    Args:
        layer: A `keras.Layer`.
    """
    return bool(getattr(layer, "lora_enabled", False))


def kernel_shape(layer: Any) -> tuple[int, ...]:
    """Gives the shape of a kernel, of which a quantized layer may keep another one.

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
    """Gives the gradients by a kernel, or by the factors of its change.

    Args:
        layer: A layer with a kernel whose last axis is one of its outputs'.
        inputs: Shape [examples, positions, p].
        outputs: Gradients by the outputs, shape [examples, positions, q].
        axes: As in `Product`.
    """
    if not is_enabled(layer):
        return [Product(layer.kernel, inputs, outputs, axes)]
    first, second, scale = _factors(layer, "kernel")
    inputs, outputs = tf.cast(inputs, tf.float32), tf.cast(outputs, tf.float32) * scale
    rank, last = second.shape
    p, others = inputs.shape[2], outputs.shape[2] // last  # axes of the outputs but the last
    positions = _known_or(outputs.shape[1], tf.shape(outputs)[1])
    split = tf.reshape(outputs, [-1, positions * others, last])
    by_first = tf.reshape(
        tf.matmul(split, second, transpose_b=True), [-1, positions, others * rank]
    )
    of_first = None
    if axes is None:
        matrix = tf.reshape(first, [p, rank])
    else:
        shape, order = axes
        of_first = [*shape[:-1], rank], order
        back = [list(order).index(axis) for axis in range(len(order))]
        matrix = tf.reshape(tf.transpose(first, back), [p, others * rank])
    seen = tf.reshape(tf.matmul(inputs, matrix), [-1, positions * others, rank])
    return [
        Product(layer.lora_kernel_a, inputs, by_first, of_first),
        Product(layer.lora_kernel_b, seen, split),
    ]


def of_table(layer: Any, rows: Tensor, outputs: Tensor) -> list[GradientPart]:
    """Gives the gradients by a table of embeddings, or by the factors of its change.

    Args:
        layer: A `keras.layers.Embedding`.
        rows: Which were looked up, int, shape [examples, positions].
        outputs: Gradients by what was looked up, shape [examples, positions, q].
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
    both = [getattr(layer, f"lora_{name}_{which}") for which in "ab"]
    first, second = (tf.cast(tf.convert_to_tensor(v), tf.float32) for v in both)
    return first, second, layer.lora_alpha / layer.lora_rank


def _known_or(size: int | None, dynamic: Tensor) -> Any:
    return dynamic if size is None else size
