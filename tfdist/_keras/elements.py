"""Proves the shapes of a `tf.data.Dataset`'s elements, and which of their parts have rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import tensorflow as tf

from tfdist._keras import dataset_files, row_wise
from tfdist._keras.inlined import InlinedGraphs, in_common
from tfdist._keras.row_wise import Leaf

# Names of dataset classes.
SAME = frozenset(
    {
        "CacheDataset", "_AssertCardinalityDataset", "_OptionsDataset", "_PrefetchDataset",
        "_RestructuredDataset", "_TakeDataset",
    }
)  # fmt: skip
# These move elements to other places. So a short batch of one part may meet a full batch of
# another part in `zip`, even if both parts had equal batches before.
MOVED = frozenset(
    {
        "_GlobalShuffleDataset", "_RebatchDataset", "_RepeatDataset", "_ShardDataset",
        "_ShuffleAndRepeatDataset", "_ShuffleDataset", "_SkipDataset",
    }
)  # fmt: skip
BATCHES = frozenset({"_BatchDataset", "_ParallelBatchDataset"})
MAPS = frozenset({"_MapDataset", "_ParallelMapDataset"})
_NUMBERS = frozenset({"_RandomDataset", "_RangeDataset", "_VariantDataset"})
_UNKNOWN = tf.TensorShape(None)


class Elements:
    """Describes the elements of datasets.

    Attributes:
        proofs: The proofs about maps of batches, by the id of the dataset.
        graphs: The inlined graphs of the maps' functions.
    """

    def __init__(self) -> None:
        self._leaves: dict[tuple[int, bool], list[Leaf]] = {}
        self.proofs: dict[int, row_wise.Proof] = {}
        self.graphs = InlinedGraphs()

    def of(self, dataset: Any, level: int) -> list[Leaf]:
        """Describes each part of a dataset's elements.

        Args:
            dataset: A dataset.
            level: How many times its elements are batched.
        """
        key = (id(dataset), level > 0)
        if key not in self._leaves:
            self._leaves[key] = self._look(dataset, level)
        return self._leaves[key]

    def _look(self, dataset: Any, level: int) -> list[Leaf]:
        kind, inputs = type(dataset).__name__, dataset._inputs()
        if kind in SAME:
            return self.of(inputs[0], level)
        if kind == "_DenseToRaggedDataset":
            pairs = zip(
                tf.nest.flatten(dataset.element_spec), self.of(inputs[0], level), strict=True
            )
            return [
                leaf if isinstance(spec, tf.TensorSpec) else Leaf(_UNKNOWN, leaf.rows)
                for spec, leaf in pairs
            ]
        if kind in MOVED:
            leaves = self.of(inputs[0], level)
            if kind == "_RebatchDataset":
                leaves = [Leaf(_batched(leaf.shape[1:], None), leaf.rows) for leaf in leaves]
            return _anew(dataset, leaves)
        if kind in BATCHES or kind == "_PaddedBatchDataset":
            return self._of_batches(dataset, level)
        if kind == "_UnbatchDataset":
            return [Leaf(leaf.shape[1:], id(dataset)) for leaf in self.of(inputs[0], level + 1)]
        if kind == "_ZipDataset":
            return [leaf for inner in inputs for leaf in self.of(inner, level)]
        if kind in ("_ConcatenateDataset", "_DirectedInterleaveDataset"):
            joined = inputs[kind.startswith("_D") :]
            return _of_choices(dataset, [self.of(inner, level) for inner in joined])
        if kind in MAPS:
            return self._mapped(dataset, level)
        spec = (
            dataset_files.saved_spec(dataset)
            if kind == "_LoadDataset"
            else dataset.element_spec
        )
        specs = tf.nest.flatten(spec)
        rows = None if kind in _NUMBERS else id(dataset)
        return [Leaf(_shape(spec), rows) for spec in specs]

    def _of_batches(self, dataset: Any, level: int) -> list[Leaf]:
        source = dataset._inputs()[0]
        size, count = int(dataset._batch_size), int(source.cardinality())
        drops = bool(dataset._drop_remainder)
        always = size if drops else None
        rows: Hashable = id(dataset)  # the last batch may be short
        if drops or (count >= 0 and count % size == 0):
            rows = size
        # Equal for all parts with as many elements, also if the last batch is short.
        elif count >= 0:
            rows = (size, count)
        specs = tf.nest.flatten(dataset.element_spec)
        inner = self.of(source, level - 1)
        if type(dataset).__name__ == "_PaddedBatchDataset":
            return [Leaf(_batched(_shape(spec)[1:], always), rows) for spec in specs]
        return [
            Leaf(
                _batched(leaf.shape, always) if isinstance(spec, tf.TensorSpec) else _UNKNOWN,
                rows,
            )
            for spec, leaf in zip(specs, inner, strict=True)
        ]

    def _mapped(self, dataset: Any, level: int) -> list[Leaf]:
        leaves, function = self.of(dataset._inputs()[0], level), dataset._map_func.function
        specs = tf.nest.flatten(dataset.element_spec)
        if level > 0:
            self.proofs[id(dataset)] = proof = row_wise.proof(function, leaves, self.graphs)
            if proof.mixing is None and len(proof.outputs) == len(specs):
                return list(proof.outputs)
            return [Leaf(_UNKNOWN, id(dataset)) for _ in specs]
        try:
            outputs = self.graphs.of(function, [leaf.shape for leaf in leaves]).outputs
        except ValueError:
            outputs = []
        if len(outputs) != len(specs):
            return [Leaf(_UNKNOWN, id(dataset)) for _ in specs]
        return [
            Leaf(t.shape if isinstance(spec, tf.TensorSpec) else _UNKNOWN, id(dataset))
            for t, spec in zip(outputs, specs, strict=True)
        ]


def _shape(spec: Any) -> Any:
    return spec.shape if isinstance(spec, tf.TensorSpec) else _UNKNOWN


def _batched(shape: Any, size: int | None) -> Any:
    return tf.TensorShape([size]).concatenate(shape)


def _anew(dataset: Any, leaves: Sequence[Leaf]) -> list[Leaf]:
    """Returns the leaves of a dataset that moves elements.

    Leaves with equal numbers of rows still have equal numbers, but only within this dataset.
    """
    return [
        leaf if leaf.rows is None else Leaf(leaf.shape, (id(dataset), leaf.size))
        for leaf in leaves
    ]


def _of_choices(dataset: Any, parts: Sequence[Sequence[Leaf]]) -> list[Leaf]:
    """Returns the leaves of a dataset that takes each element from one of several datasets."""
    are_equal = all(len({leaf.size for leaf in part}) == 1 for part in parts)
    joined_leaves = []
    for number, leaves in enumerate(zip(*parts, strict=True)):
        shape = in_common([leaf.shape for leaf in leaves])
        public = all(leaf.rows is None for leaf in leaves)
        joined_leaves.append(
            Leaf(shape, None if public else (id(dataset), 0 if are_equal else number))
        )
    return joined_leaves
