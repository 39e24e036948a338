"""A share of a batch, computed piece by piece or by a function compiled by XLA."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist.privacy import _layers
from tfdist.privacy.clipping import clipped_sum
from tfdist.privacy.settings import Mechanism

Tensor = Any
Columns = tuple[Any, Any, Any]
_ROUNDED_TO = 32  # rows: XLA compiles once for each number of them


def clipped_share(
    model: Any,
    columns: Columns,
    batch: ReplicaBatch,
    mechanism: Mechanism,
    l2_norm_clip: Any,
    compiled: bool = False,
) -> tuple[Any, list[Tensor], Tensor]:
    """Gives a share's outputs, the sums of its clipped gradients, and `Clipped.votes`.

    Args:
        model: A compiled, built `keras.Model`.
        columns: `x`, `y` and `sample_weight` of the share.
        batch: What the replica knows of it.
        mechanism: What is done to the gradients.
        l2_norm_clip: The norm that they are clipped to.
        compiled: Whether by XLA.
    """
    examples = _examples(columns)
    if mechanism.microbatch_size is None and not compiled:
        mask = tf.range(examples) < tf.cast(batch.rows, tf.int32)
        x, y, weight = columns
        clipped = clipped_sum(model, x, y, mask, l2_norm_clip, weight, mechanism.per_layer)
        return clipped.outputs, clipped.sums, clipped.votes
    outputs, sums = _Pieces(model, columns, batch, mechanism, l2_norm_clip, compiled).all()
    return outputs, sums[:-1], sums[-1]


class _Pieces:
    """Computes one piece after the other, or all as one piece.

    Its sums are those of clipped gradients, and last their `votes`.
    """

    def __init__(
        self,
        model: Any,
        columns: Columns,
        batch: ReplicaBatch,
        mechanism: Mechanism,
        l2_norm_clip: Any,
        compiled: bool,
    ) -> None:
        self._model = model
        self._columns = columns
        self._batch = batch
        self._mechanism = mechanism
        self._l2_norm_clip = l2_norm_clip
        self._compiled = compiled
        self._examples = _examples(columns)
        self._seeds = [v for v in model.non_trainable_variables if _layers.is_seed(v)]
        self._structure: Any = None
        self._masked: list[bool] = []

    def all(self) -> tuple[Any, list[Tensor]]:
        drawn = [tf.identity(seed.value) for seed in self._seeds]
        for seed, value in zip(self._seeds, drawn, strict=True):
            seed.assign(value)  # noted here, since in an inner graph it cannot be
        size = self._mechanism.microbatch_size
        if size is None:
            rounded = -(-self._examples // _ROUNDED_TO) * _ROUNDED_TO
            flat, sums = self._piece(tf.constant(0), rounded)
            return self._packed(flat), sums
        count = -(-self._examples // size)

        def body(index: Tensor, sums: list[Tensor], kept: list[Any]) -> Any:
            for seed, value in zip(self._seeds, drawn, strict=True):
                seed.assign(value)  # a place in the batch has its random numbers
            flat, more = self._piece(index * size, tf.constant(size))
            kept = [array.write(index, part) for array, part in zip(kept, flat, strict=True)]
            return index + 1, [a + b for a, b in zip(sums, more, strict=True)], kept

        # The first piece tells the outputs' types.
        first, sums = self._piece(tf.constant(0), tf.constant(size))
        kept = [
            tf.TensorArray(
                part.dtype,
                count,
                infer_shape=False,
                element_shape=[None, *part.shape[1:]],
            ).write(0, part)
            for part in first
        ]
        _, sums, kept = tf.while_loop(
            lambda index, *_: index < count,
            body,
            (tf.constant(1), sums, kept),
            maximum_iterations=count,
            parallel_iterations=1,
        )
        return self._packed([array.concat() for array in kept]), sums

    def _piece(self, begin: Tensor, size: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        count = tf.minimum(size, self._examples - begin)
        if not self._compiled:
            columns = _map(lambda leaf: leaf[begin : begin + count], self._columns)
            return self._computed(columns, begin)
        # Of one shape for many batches; what is there twice does not count.
        rows = tf.minimum(begin + tf.range(size), self._examples - 1)
        columns = _map(lambda leaf: tf.gather(leaf, rows), self._columns)
        compiled = tf.function(self._computed, autograph=False, jit_compile=True)
        flat, sums = compiled(columns, begin)
        return [part[:count] for part in flat], sums

    def _computed(self, columns: Columns, begin: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        batch = self._batch
        start = tf.cast(begin, tf.int64)
        examples = tf.cast(_examples(columns), tf.int64)
        counted = start + tf.range(examples) < batch.rows
        piece = ReplicaBatch(examples, batch.total, batch.offset + start, batch.all_reduce)
        with _keras.on_replica(piece):
            clipped = clipped_sum(
                self._model,
                columns[0],
                columns[1],
                counted,
                self._l2_norm_clip,
                columns[2],
                self._mechanism.per_layer,
            )
        leaves = tf.nest.flatten(clipped.outputs)
        self._structure = clipped.outputs
        self._masked = [_layers.has_mask(leaf) for leaf in leaves]
        masks = [leaf._keras_mask for leaf in leaves if _layers.has_mask(leaf)]
        return [*leaves, *masks], [*clipped.sums, clipped.votes]

    def _packed(self, flat: list[Tensor]) -> Any:
        """Undoes `_computed`'s flattening."""
        outputs, masks = flat[: len(self._masked)], iter(flat[len(self._masked) :])
        for output, masked in zip(outputs, self._masked, strict=True):
            if masked:
                output._keras_mask = next(masks)
        return tf.nest.pack_sequence_as(self._structure, outputs)


def _examples(columns: Columns) -> Tensor:
    return tf.shape(tf.nest.flatten(columns[0])[0])[0]


def _map(function: Any, columns: Columns) -> Columns:
    mapped: Columns = tf.nest.map_structure(
        lambda leaf: leaf if leaf is None else function(leaf), columns
    )
    return mapped
