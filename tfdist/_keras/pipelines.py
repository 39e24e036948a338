"""Whether examples of a `tf.data.Dataset` keep their places, whatever the others hold.

A private step bounds what one example changes. That bounds nothing if an example decides into
which batch others go, or what they become. So only operations pass that are known to go by
numbers and places alone; what is not known is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfdist._keras import dataset_maps
from tfdist._keras.datasets import written

# By the names of their classes. These keep the order, or choose by number.
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
_FROM_FILES = frozenset({"_FlatMapDataset", "_InterleaveDataset", "_ParallelInterleaveDataset"})
_JOINS = frozenset({"_ConcatenateDataset", "_DirectedInterleaveDataset", "_ZipDataset"})
_NUMBERS = frozenset({"_RandomDataset", "_RangeDataset"})
_OF_NUMBERS = frozenset(  # by the names of their ops
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
# By the names of their ops, in what makes a data set of a file's name.
_READERS = frozenset(
    {"FixedLengthRecordDatasetV2", "TFRecordDataset", "TFRecordDatasetV2", "TextLineDataset"}
)
_IN_FILES = _READERS | {
    "BatchDatasetV2", "FlatMapDataset", "MapDataset", "OptionsDataset", "ParallelMapDatasetV2",
    "PrefetchDataset", "ShardDataset", "SkipDataset", "TakeDataset", "TensorSliceDataset",
}  # fmt: skip

_AHEAD = "Do that once ahead, and train on what you saved (Dataset.save and load, or arrays)."
_WEIGH = "To leave examples out, map them to a `sample_weight` of 0. " + _AHEAD
_PROMISE = "Pass `min_separation`: your promise of how often an example may come."
_BEFORE = "Let `map` come before `batch`, or pass random layers as fit(augment=...)."
_REMEDIES = {"_FilterDataset": _WEIGH, "_TakeWhileDataset": _WEIGH, "_UniqueDataset": _WEIGH}

Problem = tuple[str, str]


def misplaced(dataset: Any, promised: bool) -> Problem | None:
    """Finds what may let an example of a dataset decide about others, or come twice in a pass.

    Args:
        dataset: A `tf.data.Dataset` of batches.
        promised: Whether the user has said how often an example comes.

    Returns:
        What it is, a part of a sentence, and a sentence that says what to do; None if every
        example is known to keep its place. Python code in maps is not looked into.
    """
    walk = _Walk()
    if dataset.options().deterministic is False:
        return "options that let elements come out of order", "Set deterministic=True."
    walk.look(dataset, of_batches=True, is_mapped=False)
    if walk.problem is None and not promised:
        return walk.again
    return walk.problem


class _Walk:
    """Goes through a dataset from its end to its sources.

    Attributes:
        problem: The first thing that is wrong, whatever is promised.
        again: The first by which an example might come more than once.
    """

    def __init__(self) -> None:
        self.problem: Problem | None = None
        self.again: Problem | None = None
        self._sources: list[Any] = []

    def look(self, one: Any, of_batches: bool, is_mapped: bool) -> None:
        """Looks at a dataset and all before it.

        Args:
            one: The dataset.
            of_batches: Whether its elements are batches.
            is_mapped: Whether a function makes something of them before they are joined.
        """
        kind, before = type(one).__name__, one._inputs()
        known = _UNCHANGED | _BATCHES | _MAPS | _FROM_FILES | _JOINS | _NUMBERS | _SOURCES
        if kind in ("_PaddedBatchDataset", "_UnbatchDataset"):
            self._look_at_sizes(one, before[0])
        elif kind == "_VariantDataset" and _are_numbers(one):
            return  # as `enumerate` and `choose_from_datasets` have them
        elif kind not in known:
            self._note(f"the operation {_plain(kind)}", _REMEDIES.get(kind, _AHEAD))
        if kind in _MAPS:
            self._look_at_map(one, of_batches)
        elif kind in _FROM_FILES:
            self._look_at_files(one)
        if getattr(one, "_deterministic", None) == "false":
            self._note(f"{_plain(kind)}(deterministic=False)", "Leave `deterministic` out.")
        if self.problem is not None:
            return
        if kind in _SOURCES or (kind == "_RangeDataset" and is_mapped):
            self._look_at_source(one)
            return  # how files are read is its own affair
        if kind == "_DirectedInterleaveDataset":
            choice, *before = before
            self._look_at_choice(choice)
        of_batches = kind not in _BATCHES | {"_PaddedBatchDataset"} and of_batches
        is_mapped = kind not in _JOINS and (is_mapped or kind in _MAPS | _FROM_FILES)
        for inner in before:
            self.look(inner, of_batches or kind == "_UnbatchDataset", is_mapped)

    def _note(self, what: str, remedy: str) -> None:
        self.problem = self.problem or (what, remedy)

    def _may_come_again(self, what: str, remedy: str = _PROMISE) -> None:
        self.again = self.again or (what, remedy)

    def _look_at_sizes(self, one: Any, before: Any) -> None:
        """Rows that are padded, or cut up, must not be so by what they or others hold."""
        if type(one).__name__ == "_UnbatchDataset":
            sizes = [leaf.shape[:1] for leaf in tf.nest.flatten(before.element_spec)]
            if not all(shape.is_fully_defined() for shape in sizes):
                self._note("unbatch of batches whose sizes may differ", _AHEAD)
            return
        shapes = [leaf.shape[1:] for leaf in tf.nest.flatten(one.element_spec)]
        if not all(shape.is_fully_defined() for shape in shapes):
            remedy = "Pass padded_batch(..., padded_shapes=...) of known sizes."
            self._note("padded_batch to the longest example of a batch", remedy)

    def _look_at_files(self, one: Any) -> None:
        function = one._map_func.function
        ops = {node.op for node in dataset_maps.nodes(function)}
        made = {op for op in ops if "Dataset" in op}
        if "GeneratorDataset" in made:
            self._may_come_again("a Python generator")
        elif (
            not made & _READERS
            or not made <= _IN_FILES
            or dataset_maps.captures_datasets(function)
        ):
            name = _plain(type(one).__name__)
            self._note(f"{name} of other things than files' names", _AHEAD)

    def _look_at_choice(self, choice: Any) -> None:
        if not _are_numbers(choice):
            self._note("choices that come from data", "Choose by Dataset.range or by weights.")

    def _look_at_source(self, one: Any) -> None:
        if any(_is_same(one, other) for other in self._sources):
            joined = "Give each source once: map(lambda x: (x, x)) rather than zip. "
            self._may_come_again("one source in several places", joined + _PROMISE)
        self._sources.append(one)

    def _look_at_map(self, one: Any, of_batches: bool) -> None:
        function = one._map_func.function
        state = dataset_maps.state_of(function)
        if state is not None:
            self._note(f"a map that may keep state ({state})", _AHEAD)
        if not of_batches or self.problem is not None:
            return
        specs = tf.nest.flatten(one._inputs()[0].element_spec)
        if not all(isinstance(spec, tf.TensorSpec) and spec.shape.rank for spec in specs):
            if all(isinstance(spec, tf.TensorSpec) for spec in specs):
                self._may_come_again("a function that makes whole batches")
            else:
                self._note("a map of batches that are ragged or sparse", _BEFORE)
            return
        untried = dataset_maps.untried(function)
        if untried is not None:
            self._note(f"a map of batches that cannot be tried ({untried})", _BEFORE)
        elif dataset_maps.mixes_rows(one):
            self._note("a map of batches in which a row depends on others", _BEFORE)


def _are_numbers(one: Any) -> bool:
    """Tells whether a dataset is made of ranges and random numbers alone."""
    try:
        graph = written(one)
    except tf.errors.OpError:
        return False
    return {node.op for node in graph.node if "Dataset" in node.op} <= _OF_NUMBERS


def _plain(kind: str) -> str:
    """Makes a method's name of a class's."""
    words = kind.strip("_").removesuffix("Dataset").removeprefix("Parallel")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in words).strip("_")


def _is_same(one: Any, other: Any) -> bool:
    """Tells whether two sources give the same elements."""
    if one is other or type(one) is not type(other):
        return one is other
    names = ("_tensors", "_filenames", "_path", "_start", "_stop", "_step")
    mine, others = (
        [t for n in names for t in tf.nest.flatten(vars(d).get(n, []))] for d in (one, other)
    )
    if len(mine) != len(others) or not mine:
        return False
    return all(_are_equal(a, b) for a, b in zip(mine, others, strict=True))


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, tf.data.Dataset):
        return _is_same(one, other)
    if tf.is_tensor(one) and one.dtype == tf.variant:
        return one is other
    one, other = np.asarray(one), np.asarray(other)
    return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
