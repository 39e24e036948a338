"""Packs small tensors into one, since a collective has a fixed cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tensorflow as tf

from tfdist.strategies.base import Tensor


def reduce_packed(
    tensors: Sequence[Tensor],
    reduce: Callable[[Tensor], Tensor],
    largest: float = math.inf,
    pack_bytes: float = math.inf,
) -> list[Tensor]:
    """Reduces tensors. Dense tensors of one type are packed into flat tensors.

    Args:
        tensors: Dense tensors, or `tf.IndexedSlices`, which are never packed.
        reduce: Sums one tensor over all replicas.
        largest: Number of elements above which a tensor is reduced on its own. If there is
            such a limit, a tensor of unknown size is reduced on its own too.
        pack_bytes: Number of bytes that a pack may have. A larger tensor is reduced on its
            own.

    Returns:
        The reduced tensors, in their order.
    """
    reduced = list(tensors)
    for indices in packs_of(tensors, largest, pack_bytes):
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


def packs_of(
    tensors: Sequence[Tensor], largest: float = math.inf, pack_bytes: float = math.inf
) -> list[list[int]]:
    """Groups tensors into packs: dense tensors of one type, unless they are large.

    Args:
        tensors: As in `reduce_packed`.
        largest: As in `reduce_packed`.
        pack_bytes: As in `reduce_packed`.

    Returns:
        The indices of each pack's tensors. Each tensor is in one pack. With `pack_bytes`, the
        packs are in the order in which the backward pass completes them.
    """
    # All replicas must form the same packs in the same order, since their collectives are
    # matched. So only static types and shapes decide.
    single: list[list[int]] = []
    packs: list[list[int]] = []
    # The open pack of each type, and its bytes. The key is the name of the type: a tf.DType
    # equals its enum number, tf.float32 == 1.
    open_packs: dict[str, tuple[list[int], int]] = {}
    is_bounded = pack_bytes < math.inf
    indices = range(len(tensors))
    # The backward pass computes the gradients of the last layers first.
    for index in reversed(indices) if is_bounded else indices:
        tensor = tensors[index]
        if _is_single(tensor, largest) or _bytes_of(tensor) > pack_bytes:
            single.append([index])
            continue
        key = tensor.dtype.name
        pack, size = open_packs.get(key, ([], 0))
        if not pack or size + _bytes_of(tensor) > pack_bytes:
            pack, size = [], 0
            packs.append(pack)
        pack.append(index)
        open_packs[key] = pack, size + _bytes_of(tensor)
    if is_bounded:
        return sorted([*single, *packs], key=lambda pack: -pack[-1])
    return [*single, *packs]


def _is_single(tensor: Tensor, largest: float) -> bool:
    if not isinstance(tensor, tf.Tensor):
        return True
    elements = tensor.shape.num_elements()
    return largest < math.inf and (elements is None or elements > largest)


def _bytes_of(tensor: tf.Tensor) -> int:
    """Counts the bytes of a tensor, 0 if its size is not known."""
    return (tensor.shape.num_elements() or 0) * int(tensor.dtype.size)
