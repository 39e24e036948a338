"""Many small tensors travel as one: a collective costs more than its bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from tfdist.strategies.base import Tensor


def reduce_packed(
    tensors: Sequence[Tensor],
    reduce: Callable[[Tensor], Tensor],
    largest: float = float("inf"),
) -> list[Tensor]:
    """Reduces tensors, dense ones of one type together as one flat tensor.

    Args:
        tensors: Dense tensors, or `tf.IndexedSlices`, which are never packed.
        reduce: Sums one tensor over all replicas.
        largest: Elements above which a tensor travels alone; so does one whose size is
            unknown, unless there is no such limit.

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
    """Says which tensors travel together: dense ones of one type, unless they are large.

    Args:
        tensors: As in `reduce_packed`.
        largest: As in `reduce_packed`.

    Returns:
        The positions of each pack's tensors; each tensor is in one pack.
    """
    alone: list[list[int]] = []
    # By name: a tf.DType equals the number that it has among the types, tf.float32 == 1.
    together: dict[str, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if _travels_alone(tensor, largest):
            alone.append([index])
        else:
            together.setdefault(tensor.dtype.name, []).append(index)
    return [*alone, *together.values()]


def _travels_alone(tensor: Tensor, largest: float) -> bool:
    if not isinstance(tensor, tf.Tensor):
        return True
    elements = tensor.shape.num_elements()
    return largest < float("inf") and (elements is None or elements > largest)
