"""Computes a replica's batch in pieces, or by a function that XLA compiles."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tfdist import _keras
from tfdist._keras import ReplicaBatch
from tfdist._keras import layers as keras_layers
from tfdist.privacy.mechanism.clipping import clipped_sum
from tfdist.privacy.mechanism.clipping_groups import (
    Alone,
    ClippingGroups,
    CopiesOfExamples,
    Groups,
    begins,
)
from tfdist.privacy.mechanism.mechanism import Mechanism
from tfdist.privacy.mechanism.unfit_layers import check_untouched

Tensor = Any
Columns = tuple[Any, Any, Any]
_ROUNDED_TO = 32  # rows: XLA compiles the function anew for each number of rows


def clipped_share(
    model: Any,
    columns: Columns,
    batch: ReplicaBatch,
    mechanism: Mechanism,
    l2_norm_clip: Any,
    compiled: bool = False,
    groups: Tensor | None = None,
) -> tuple[Any, list[Tensor], Tensor]:
    """Returns a replica's outputs, the sums of its clipped gradients, and `Clipped.votes`.

    Args:
        model: A compiled, built `keras.Model`.
        columns: `x`, `y` and `sample_weight` of the replica's batch.
        batch: Its description.
        mechanism: The clipping and the noise.
        l2_norm_clip: The clipping norm.
        compiled: Whether XLA compiles the computation. It is ignored with `groups`, whose sizes
            differ between batches.
        groups: The user of each row if users are clipped, else None.
    """
    compiled = compiled and groups is None
    if mechanism.microbatch_size is None and not compiled:
        mask = tf.range(_examples(columns)) < tf.cast(batch.rows, tf.int32)
        x, y, weight = columns
        grouping = _grouping(mechanism, groups)
        clipped = clipped_sum(
            model, x, y, mask, l2_norm_clip, weight, mechanism.per_layer, grouping
        )
        return clipped.outputs, clipped.sums, clipped.votes
    pieces = _Pieces(model, columns, batch, mechanism, l2_norm_clip, compiled, groups)
    outputs, sums = pieces.all()
    return outputs, sums[:-1], sums[-1]


def _grouping(mechanism: Mechanism, groups: Tensor | None) -> ClippingGroups:
    if groups is not None:
        assert mechanism.rows_of_user is not None
        return Groups(groups, mechanism.rows_of_user, mechanism.copies)
    return CopiesOfExamples(mechanism.copies) if mechanism.copies > 1 else Alone()


class _Pieces:
    """Computes one piece after the other, or everything as one piece. No unit is split.

    The sums are those of clipped gradients, followed by their `votes`.
    """

    def __init__(
        self,
        model: Any,
        columns: Columns,
        batch: ReplicaBatch,
        mechanism: Mechanism,
        l2_norm_clip: Any,
        compiled: bool,
        groups: Tensor | None,
    ) -> None:
        self._model = model
        self._columns = columns
        self._batch = batch
        self._mechanism = mechanism
        self._l2_norm_clip = l2_norm_clip
        self._compiled = compiled
        self._groups = groups
        self._examples = _examples(columns)
        self._seeds = [v for v in model.non_trainable_variables if keras_layers.is_seed(v)]
        self._structure: Any = None
        self._masked: list[bool] = []

    def all(self) -> tuple[Any, list[Tensor]]:
        """Returns the outputs of all rows, and the sums."""
        seed_values = [tf.identity(seed.value) for seed in self._seeds]
        with _keras.seeding():
            for seed, value in zip(self._seeds, seed_values, strict=True):
                # The replica's batch records variables that change. Within the loop below it
                # could not, since that is another graph.
                seed.assign(value)
        edges, size = self._edges()
        count = tf.size(edges) - 1
        if self._mechanism.microbatch_size is None:
            flat, sums = self._piece(edges[0], edges[1], size)
            return self._packed(flat), sums

        def body(index: Tensor, sums: list[Tensor], arrays: list[Any]) -> Any:
            with _keras.seeding():
                for seed, value in zip(self._seeds, seed_values, strict=True):
                    # Each piece begins with the seeds of the whole batch: random numbers depend
                    # on a row's place in the batch, not on its piece.
                    seed.assign(value)
            flat, piece_sums = self._piece(edges[index], edges[index + 1], size)
            arrays = [
                array.write(index, part) for array, part in zip(arrays, flat, strict=True)
            ]
            sums = [a + tf.cast(b, a.dtype) for a, b in zip(sums, piece_sums, strict=True)]
            return index + 1, sums, arrays

        # The first piece is computed outside the loop, which needs the outputs' types.
        first, of_first = self._piece(edges[0], edges[1], size)
        sums = [tf.cast(total, tf.float64) for total in of_first]
        arrays = [
            tf.TensorArray(
                part.dtype,
                count,
                infer_shape=False,
                element_shape=[None, *part.shape[1:]],
            ).write(0, part)
            for part in first
        ]
        # One piece at a time, or the memory of all pieces would be needed at once.
        _, sums, arrays = tf.while_loop(
            lambda index, *_: index < count,
            body,
            (tf.constant(1), sums, arrays),
            maximum_iterations=count,
            parallel_iterations=1,
        )
        outputs = self._packed([array.concat() for array in arrays])
        return outputs, [
            tf.cast(total, part.dtype) for total, part in zip(sums, of_first, strict=True)
        ]

    def _edges(self) -> tuple[Tensor, Tensor]:
        """Returns the first row of each piece, the end, and the most rows of a piece."""
        size, copies = self._mechanism.microbatch_size, self._mechanism.copies
        if size is None:
            multiple = math.lcm(_ROUNDED_TO, copies)
            return tf.stack([0, self._examples]), -(-self._examples // multiple) * multiple
        if self._groups is None:
            size = max(1, size // copies) * copies
            starts = tf.range(0, self._examples, size)
        else:
            assert self._mechanism.rows_of_user is not None
            users = max(1, size // (self._mechanism.rows_of_user * copies))
            starts = begins(self._groups)[::users]
        return tf.concat([starts, [self._examples]], 0), tf.constant(size)

    def _piece(
        self, begin: Tensor, end: Tensor, size: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self._compiled:
            columns = _map(lambda leaf: with_any_size(leaf[begin:end]), self._columns)
            groups = None if self._groups is None else self._groups[begin:end]
            return self._computed(columns, begin, groups)
        # Padding by the last row gives many batches the same shape. Padding does not count.
        rows = tf.minimum(begin + tf.range(size), self._examples - 1)
        columns = _map(lambda leaf: with_any_size(tf.gather(leaf, rows)), self._columns)
        compiled = tf.function(self._computed, autograph=False, jit_compile=True)
        flat, sums = compiled(columns, begin)
        return [part[: end - begin] for part in flat], sums

    def _computed(
        self, columns: Columns, begin: Tensor, groups: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        batch = self._batch
        start = tf.cast(begin, tf.int64)
        examples = tf.cast(_examples(columns), tf.int64)
        mask = start + tf.range(examples) < batch.rows
        piece = ReplicaBatch(
            examples, batch.total, batch.offset + start, batch.all_reduce, batch.all_gather
        )
        if batch.keys is not None:
            places = tf.minimum(begin + tf.range(_examples(columns)), self._examples - 1)
            piece.keys = batch.keys.at(places)
        with _keras.on_replica(piece):
            clipped = clipped_sum(
                self._model,
                columns[0],
                columns[1],
                mask,
                self._l2_norm_clip,
                columns[2],
                self._mechanism.per_layer,
                _grouping(self._mechanism, groups),
            )
        check_untouched(self._model, piece)
        leaves = tf.nest.flatten(clipped.outputs)
        self._structure = clipped.outputs
        self._masked = [keras_layers.has_mask(leaf) for leaf in leaves]
        masks = [keras_layers.mask_of(leaf) for leaf in leaves if keras_layers.has_mask(leaf)]
        return [*leaves, *masks], [*clipped.sums, clipped.votes]

    def _packed(self, flat: list[Tensor]) -> Any:
        """Undoes `_computed`'s flattening."""
        outputs, masks = flat[: len(self._masked)], iter(flat[len(self._masked) :])
        for output, masked in zip(outputs, self._masked, strict=True):
            if masked:
                keras_layers.give_mask(output, next(masks))
        return tf.nest.pack_sequence_as(self._structure, outputs)


def with_any_size(column: Any) -> Any:
    """Forgets the static number of rows of a batch, while a step is traced.

    A random number belongs to a row if the first axis of its tensor is the batch. An axis of
    the same static length, that of a weight or of positions, must not be taken for it.

    Args:
        column: A tensor whose first axis is the batch.
    """
    if not isinstance(column, tf.Tensor) or tf.executing_eagerly():
        return column
    return tf.compat.v1.placeholder_with_default(column, [None, *column.shape[1:]])


def _examples(columns: Columns) -> Tensor:
    return tf.shape(tf.nest.flatten(columns[0])[0])[0]


def _map(function: Any, columns: Columns) -> Columns:
    mapped: Columns = tf.nest.map_structure(
        lambda leaf: leaf if leaf is None else function(leaf), columns
    )
    return mapped
