"""Checks that an example of a `tf.data.Dataset` cannot influence other examples.

A private step bounds the effect of one example. The bound fails if an example decides which
batch others go into, or what their values are. So only known operations pass: those whose
effect depends on counts and positions alone. All others are refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfdist._keras import dataset_maps, row_wise
from tfdist._keras.datasets import written

# Names of dataset classes. These keep the order, or choose by position.
_UNCHANGED = frozenset(
    {
        "CacheDataset", "_AssertCardinalityDataset", "_GlobalShuffleDataset",
        "_OptionsDataset", "_PrefetchDataset", "_RebatchDataset", "_RepeatDataset",
        "_RestructuredDataset", "_ShardDataset", "_ShuffleAndRepeatDataset",
        "_ShuffleDataset", "_SkipDataset", "_TakeDataset",
    }
)  # fmt: skip
_BATCHES = frozenset({"_BatchDataset", "_DenseToRaggedDataset", "_ParallelBatchDataset"})
_MAPS = frozenset({"_MapDataset", "_ParallelMapDataset"})
_FILE_MAPS = frozenset({"_FlatMapDataset", "_InterleaveDataset", "_ParallelInterleaveDataset"})
_JOINS = frozenset({"_ConcatenateDataset", "_DirectedInterleaveDataset", "_ZipDataset"})
_NUMBERS = frozenset({"_RandomDataset", "_RangeDataset"})
_NUMBER_OPS = frozenset(  # names of dataset ops
    {
        "BatchDatasetV2", "MapDataset", "OptionsDataset", "ParallelMapDatasetV2",
        "RandomDataset", "RandomDatasetV2", "RangeDataset", "RepeatDataset",
        "ShuffleDatasetV3", "SkipDataset", "TakeDataset", "ZipDataset",
    }
)  # fmt: skip
_SOURCES = frozenset(
    {
        "FixedLengthRecordDatasetV2", "TFRecordDatasetV2", "TextLineDatasetV2", "_ListDataset",
        "_LoadDataset", "_SparseTensorSliceDataset", "_TensorDataset", "_TensorSliceDataset",
    }
)  # fmt: skip
# Names of ops, in a function that makes a dataset of a file's name.
_READERS = frozenset(
    {"FixedLengthRecordDatasetV2", "TFRecordDataset", "TFRecordDatasetV2", "TextLineDataset"}
)
# TFRecordDataset and the like are themselves a flat_map over a list of names.
_LISTS = frozenset({"TensorDataset", "TensorSliceDataset"})
_FILE_OPS = _READERS | _LISTS | {"FlatMapDataset", "PrefetchDataset", "SkipDataset"}

_SAVE_FIRST = (
    "Do that once before training, and train on the saved result (Dataset.save, or arrays)."
)
_USE_WEIGHTS = "To leave examples out, map them to a `sample_weight` of 0. " + _SAVE_FIRST
_PROMISE = "Pass `min_separation`: your promise of how often an example may come."
_MAP_FIRST = "Let `map` come before `batch`, or pass layers as fit(augment=...)."
_READ_ALONE = "Let it only read the file, and let `map` and the rest come after it."
_REMEDIES = {
    "_FilterDataset": _USE_WEIGHTS,
    "_TakeWhileDataset": _USE_WEIGHTS,
    "_UniqueDataset": _USE_WEIGHTS,
}

Problem = tuple[str, str]


def misplaced(dataset: Any, promised: bool) -> Problem | None:
    """Finds an operation by which an example may influence others, or occur twice in a pass.

    Args:
        dataset: A `tf.data.Dataset` of batches.
        promised: Whether the user has promised how often an example occurs.

    Returns:
        The operation, as a part of a sentence, and the remedy, a sentence. None if no example
        influences others. Python code in maps is not examined.
    """
    walk = _Walk()
    if dataset.options().deterministic is False:
        return "options that let elements come out of order", "Set deterministic=True."
    walk.look(dataset, level=1, is_mapped=False)
    if walk.problem is None and not promised:
        return walk.again
    return walk.problem


class _Walk:
    """Walks through a dataset from its end to its sources.

    Attributes:
        problem: The first problem that no promise solves.
        again: The first operation by which an example may occur more than once.
    """

    def __init__(self) -> None:
        self.problem: Problem | None = None
        self.again: Problem | None = None
        self._sources: list[Any] = []

    def look(self, one: Any, level: int, is_mapped: bool) -> None:
        """Checks a dataset and all its inputs.

        Args:
            one: The dataset.
            level: How many times its elements are batched: 0 for single examples.
            is_mapped: Whether a later function maps its elements before they are joined.
        """
        kind, inputs = type(one).__name__, one._inputs()
        allowed = _UNCHANGED | _BATCHES | _MAPS | _FILE_MAPS | _JOINS | _NUMBERS | _SOURCES
        if kind in ("_PaddedBatchDataset", "_UnbatchDataset"):
            self._look_at_sizes(one, inputs[0])
        elif kind == "_VariantDataset" and _are_numbers(one):
            return  # made by `enumerate` or `choose_from_datasets`
        elif kind not in allowed:
            self._note(f"the operation {_plain(kind)}", _REMEDIES.get(kind, _SAVE_FIRST))
        if kind in _MAPS:
            self._look_at_map(one, level > 0)
        elif kind in _FILE_MAPS:
            self._look_at_files(one)
        if getattr(one, "_deterministic", None) == "false":
            self._note(f"{_plain(kind)}(deterministic=False)", "Leave `deterministic` out.")
        if self.problem is not None:
            return
        if kind in _SOURCES or (kind == "_RangeDataset" and is_mapped):
            self._look_at_source(one)
            if is_mapped and _has_numbers_alone(one):
                self._may_come_again("a map that may choose examples by their numbers")
            return  # a source's inputs are names of files and options
        if kind == "_DirectedInterleaveDataset":
            choice, *inputs = inputs
            self._look_at_choice(choice)
        level += (kind == "_UnbatchDataset") - (kind in _BATCHES | {"_PaddedBatchDataset"})
        is_mapped = kind not in _JOINS and (is_mapped or kind in _MAPS | _FILE_MAPS)
        for inner in inputs:
            self.look(inner, level, is_mapped)

    def _note(self, what: str, remedy: str) -> None:
        self.problem = self.problem or (what, remedy)

    def _may_come_again(self, what: str, remedy: str = _PROMISE) -> None:
        self.again = self.again or (what, remedy)

    def _look_at_sizes(self, one: Any, source: Any) -> None:
        """Checks that padding and unbatching do not depend on the contents of examples."""
        if type(one).__name__ == "_UnbatchDataset":
            sizes = [leaf.shape[:1] for leaf in tf.nest.flatten(source.element_spec)]
            if not all(shape.is_fully_defined() for shape in sizes):
                self._note("unbatch of batches whose sizes may differ", _SAVE_FIRST)
            return
        shapes = [leaf.shape[1:] for leaf in tf.nest.flatten(one.element_spec)]
        if not all(shape.is_fully_defined() for shape in shapes):
            remedy = "Pass padded_batch(..., padded_shapes=...) of known sizes."
            self._note("padded_batch to the longest example of a batch", remedy)

    def _look_at_files(self, one: Any) -> None:
        function = one._map_func.function
        ops = {node.op for node in dataset_maps.nodes(function)}
        dataset_ops = {op for op in ops if "Dataset" in op}
        if dataset_ops == {"GeneratorDataset"}:
            self._may_come_again("a Python generator")
        elif (
            not dataset_ops & _READERS
            or not dataset_ops <= _FILE_OPS
            or dataset_maps.captures_datasets(function)
        ):
            name = _plain(type(one).__name__)
            self._note(f"{name} of other things than files' names", _READ_ALONE)
        elif not _reads_alone(one, function):
            self._note("a function of files in which a record may decide", _READ_ALONE)

    def _look_at_choice(self, choice: Any) -> None:
        if not _are_numbers(choice):
            self._note("choices that come from data", "Choose by Dataset.range or by weights.")

    def _look_at_source(self, one: Any) -> None:
        if any(_is_same(one, other) for other in self._sources):
            remedy = "Give each source once: map(lambda x: (x, x)) rather than zip. "
            self._may_come_again("one source in several places", remedy + _PROMISE)
        self._sources.append(one)

    def _look_at_map(self, one: Any, of_batches: bool) -> None:
        function = one._map_func.function
        state = dataset_maps.state_of(function)
        if state is not None:
            self._note(f"a map that may keep state ({state})", _SAVE_FIRST)
        if not of_batches or self.problem is not None:
            return
        specs = tf.nest.flatten(one._inputs()[0].element_spec)
        if not all(isinstance(spec, tf.TensorSpec) and spec.shape.rank for spec in specs):
            if all(isinstance(spec, tf.TensorSpec) for spec in specs):
                self._may_come_again("a function that makes whole batches")
            else:
                self._note("a map of batches that are ragged or sparse", _MAP_FIRST)
            return
        varying = dataset_maps.varying_op(function)
        if varying is not None:
            self._note(f"a map of batches that draws or calls Python ({varying})", _MAP_FIRST)
            return
        mixing = row_wise.mixing_op(function)
        if mixing is not None:
            what = f"a map of batches in which a row may depend on others ({mixing})"
            self._note(what, _MAP_FIRST)


def _are_numbers(one: Any) -> bool:
    """Tells whether a dataset consists of ranges and random numbers only."""
    try:
        graph = written(one)
    except tf.errors.OpError:
        return False
    return {node.op for node in graph.node if "Dataset" in node.op} <= _NUMBER_OPS


def _has_numbers_alone(one: Any) -> bool:
    """Tells whether the elements of a source are whole numbers, as of rows."""
    leaves = tf.nest.flatten(one.element_spec)
    return all(
        isinstance(leaf, tf.TensorSpec) and leaf.dtype.is_integer and leaf.shape.rank == 0
        for leaf in leaves
    )


def _reads_alone(one: Any, function: Any) -> bool:
    """Tells whether a function of a file's name gives all records of the file, in their order.

    But for a number of them at the beginning, which is the same for each file.
    """
    names = tf.nest.flatten(one._inputs()[0].element_spec)
    if [(leaf.dtype, leaf.shape.rank) for leaf in names] != [(tf.string, 0)]:
        return False
    for op in function.graph.get_operations():
        if op.type == "SkipDataset" and tf.get_static_value(op.inputs[1]) is None:
            return False
        if op.type == "FlatMapDataset" and op.inputs[0].op.type not in _LISTS:
            return False
    library = function.graph.as_graph_def().library.function
    inner = {node.op for f in library for node in f.node_def if "Dataset" in node.op}
    return inner <= _READERS


def _plain(kind: str) -> str:
    """Converts the name of a dataset class to the name of its method."""
    words = kind.strip("_").removesuffix("Dataset").removeprefix("Parallel")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in words).strip("_")


def _is_same(one: Any, other: Any) -> bool:
    """Tells whether two sources have the same elements."""
    if one is other or type(one) is not type(other):
        return one is other
    names = ("_tensors", "_filenames", "_path", "_start", "_stop", "_step")
    a_inputs, b_inputs = (
        [t for n in names for t in tf.nest.flatten(vars(d).get(n, []))] for d in (one, other)
    )
    if len(a_inputs) != len(b_inputs) or not a_inputs:
        return False
    return all(_are_equal(a, b) for a, b in zip(a_inputs, b_inputs, strict=True))


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, tf.data.Dataset):
        return _is_same(one, other)
    if tf.is_tensor(one) and one.dtype == tf.variant:
        return one is other
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape:
        return False
    if one.dtype != other.dtype and one.dtype.kind in "fiu" and other.dtype.kind in "fiu":
        return bool(np.allclose(one, other, equal_nan=True))  # the same, in another type
    return one.dtype == other.dtype and bool((one == other).all())
