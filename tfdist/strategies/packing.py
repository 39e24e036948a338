"""Packs small tensors into one, since a collective has a fixed cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from tfdist.strategies.base import Tensor


def reduce_packed(
    tensors: Sequence[Tensor],
    reduce: Callable[[Tensor], Tensor],
    largest: float = float("inf"),
) -> list[Tensor]:
    """Reduces tensors. Dense tensors of one type are packed into one flat tensor.

    Args:
        tensors: Dense tensors, or `tf.IndexedSlices`, which are never packed.
        reduce: Sums one tensor over all replicas.
        largest: Number of elements above which a tensor is reduced on its own. If there is
            such a limit, a tensor of unknown size is reduced on its own too.

    Returns:
        The reduced tensors, in their order.
    """
    reduced = list(tensors)
    for indices in packs_of(tensors, largest):
        if len(indices) == 1:
            (index,) = indices
            reduced[index] = reduce(reduced[index])
            continue
        flat = tf.concat([tf.reshape(reduced[i], [-1]) for i in indices], 0)
        sizes = [tf.size(reduced[i]) for i in indices]
        parts = tf.split(reduce(flat), sizes, num=len(sizes))
        for index, part in zip(indices, parts, strict=True):
            reduced[index] = tf.reshape(part, tf.shape(reduced[index]))
            reduced[index].set_shape(tensors[index].shape)
    return reduced


def packs_of(tensors: Sequence[Tensor], largest: float) -> list[list[int]]:
    """Groups tensors into packs: dense tensors of one type, unless they are large.

    Args:
        tensors: As in `reduce_packed`.
        largest: As in `reduce_packed`.

    Returns:
        The indices of each pack's tensors. Each tensor is in one pack.
    """
    single: list[list[int]] = []
    # The key is the name: a tf.DType equals its enum number, tf.float32 == 1.
    packs: dict[str, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if _is_single(tensor, largest):
            single.append([index])
        else:
            packs.setdefault(tensor.dtype.name, []).append(index)
    return [*single, *packs.values()]


def _is_single(tensor: Tensor, largest: float) -> bool:
    if not isinstance(tensor, tf.Tensor):
        return True
    elements = tensor.shape.num_elements()
    return largest < float("inf") and (elements is None or elements > largest)
