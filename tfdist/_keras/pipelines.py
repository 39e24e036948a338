"""Checks that an example of a `tf.data.Dataset` cannot influence other examples.

A private step bounds the effect of one example. The bound fails if an example decides which
batch others go into, or what their values are. So only known operations pass: those whose
effect depends on counts and positions alone. All others are refused.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry as _op_defs

from tfdist._keras import dataset_files, dataset_maps
from tfdist._keras.dataset_sources import SOURCES, Sources
from tfdist._keras.datasets import serialized
from tfdist._keras.elements import BATCHES, MAPS, MOVED, SAME, Elements

# Names of dataset classes. These keep the order, or choose by position.
_UNCHANGED = SAME | MOVED | {"_DenseToRaggedDataset"}
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
# Ops of a data set of numbers that are not a function of the numbers.
_STATEFUL_NUMBERS = frozenset(
    {"AnonymousRandomSeedGenerator", "AnonymousSeedGenerator", "DummySeedGenerator", "_Retval"}
)
_FEW_NUMBERS = 16  # a constant with more numbers may hold the examples' labels

_SAVE_FIRST = (
    "Do that once before training, and train on the saved result (Dataset.save, or arrays)."
)
_USE_WEIGHTS = "To leave examples out, map them to a `sample_weight` of 0. " + _SAVE_FIRST
_PROMISE = "Pass `min_separation`: your promise of how often an example may come."
_MAP_FIRST = "Let `map` come before `batch`, or pass layers as fit(augment=...)."
_READ_ALONE = "Let it only read the file, and let `map` and the rest come after it."
_KNOWN_SHAPE = "Call tf.ensure_shape before, so that each example takes as many random numbers."
_READ_ALL = "Leave `reader_func` out."
_CHOOSE_BY_RANGE = "Choose by Dataset.range or by weights."
_ZIP_FIRST = "Let `zip` come before `batch`, or pass drop_remainder=True."
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
    walk.look(dataset, level=1, mapped="")
    if walk.problem is None:
        walk.look_at_rows(dataset)
        walk.look_at_tables()
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
        self._sources = Sources()
        self._most_rows = 0
        self._elements = Elements()

    def look(self, dataset: Any, level: int, mapped: str) -> None:
        """Checks a dataset and all its inputs.

        Args:
            dataset: The dataset.
            level: How many times its elements are batched: 0 for single examples.
            mapped: What later functions do with its elements before they are joined: nothing,
                "mapped", or "read" files or call Python.
        """
        kind, inputs = type(dataset).__name__, dataset._inputs()
        allowed = _UNCHANGED | BATCHES | MAPS | _FILE_MAPS | _JOINS | _NUMBERS | SOURCES
        if kind in ("_PaddedBatchDataset", "_UnbatchDataset"):
            self._look_at_sizes(dataset, inputs[0], level)
        elif kind == "_VariantDataset" and _are_numbers(dataset):
            return  # made by `enumerate` or `choose_from_datasets`
        elif kind not in allowed:
            self._note(f"the operation {_plain(kind)}", _REMEDIES.get(kind, _SAVE_FIRST))
        if kind in MAPS:
            self._look_at_map(dataset, level)
        elif kind in _FILE_MAPS:
            self._look_at_files(dataset)
        elif kind == "CacheDataset" and self._sources.is_cached_before(dataset):
            self._may_come_again("one file of `cache` in several places")
        elif kind == "_LoadDataset" and not dataset_files.loads_all(dataset):
            self._note("Dataset.load with a reader_func that may change elements", _READ_ALL)
        if getattr(dataset, "_deterministic", None) == "false":
            self._note(f"{_plain(kind)}(deterministic=False)", "Leave `deterministic` out.")
        if self.problem is not None:
            return
        if kind in SOURCES or (kind == "_RangeDataset" and mapped):
            self._look_at_source(dataset, mapped)
            by_number = kind == "_RangeDataset" or mapped == "read"
            if mapped and by_number and _has_numbers_alone(dataset):
                self._may_come_again("a map that may choose examples by their numbers")
            return  # a source's inputs are names of files and options
        if kind == "_DirectedInterleaveDataset":
            choice, *inputs = inputs
            self._look_at_choice(choice)
        # The walk goes towards the sources: before a batch there are single examples, and
        # before an `unbatch` there are batches.
        level += (kind == "_UnbatchDataset") - (kind in BATCHES | {"_PaddedBatchDataset"})
        if kind in _JOINS:
            mapped = ""
        elif kind in MAPS | _FILE_MAPS:
            reads = mapped == "read" or dataset_maps.reads(dataset._map_func.function)
            mapped = "read" if reads else "mapped"
        for inner in inputs:
            self.look(inner, level, mapped)

    def _note(self, operation: str, remedy: str) -> None:
        self.problem = self.problem or (operation, remedy)

    def _may_come_again(self, operation: str, remedy: str = _PROMISE) -> None:
        self.again = self.again or (operation, remedy)

    def look_at_rows(self, dataset: Any) -> None:
        """Checks that the parts of a batch have the same number of rows.

        A loss repeats one row for all rows of the others.
        """
        leaves = self._elements.of(dataset, 1)
        sizes = {leaf.size for leaf in leaves if leaf.rows is not None}
        if not sizes:
            self._may_come_again("a function that makes whole batches")
        elif len(sizes) > 1 and not all(_is_selected(size) for size in sizes):
            self._note("parts that may have different numbers of rows", _ZIP_FIRST)

    def _look_at_sizes(self, dataset: Any, source: Any, level: int) -> None:
        """Checks that padding and unbatching do not depend on the contents of examples."""
        if type(dataset).__name__ == "_UnbatchDataset":
            sizes = [leaf.shape[:1] for leaf in self._elements.of(source, level + 1)]
            if not all(shape.is_fully_defined() for shape in sizes):
                self._note("unbatch of batches whose sizes may differ", _SAVE_FIRST)
            return
        shapes = [leaf.shape[1:] for leaf in tf.nest.flatten(dataset.element_spec)]
        if not all(shape.is_fully_defined() for shape in shapes):
            remedy = "Pass padded_batch(..., padded_shapes=...) of known sizes."
            self._note("padded_batch to the longest example of a batch", remedy)

    def _look_at_files(self, dataset: Any) -> None:
        function = dataset._map_func.function
        dataset_ops = {n.op for n in dataset_maps.nodes(function) if "Dataset" in n.op}
        if dataset_ops == {"GeneratorDataset"}:
            self._may_come_again("a Python generator")
        elif not dataset_files.reads_files(function):
            name = _plain(type(dataset).__name__)
            self._note(f"{name} of other things than files' names", _READ_ALONE)
        elif not dataset_files.reads_alone(dataset, function):
            self._note("a function of files in which a record may decide", _READ_ALONE)
        elif not dataset_files.reads_its_argument(function):
            self._may_come_again("a function that may read a file twice")
        elif dataset_files.names_twice(dataset._inputs()[0], self._sources.paths):
            self._may_come_again("a file that is named twice")

    def _look_at_choice(self, choice: Any) -> None:
        if not _are_numbers(choice):
            self._note("choices that come from data", _CHOOSE_BY_RANGE)

    def _look_at_source(self, dataset: Any, mapped: str) -> None:
        if self._sources.has_rows_of(dataset):
            remedy = "Give each source once: map(lambda x: (x, x)) rather than zip. "
            self._may_come_again("one source in several places", remedy + _PROMISE)
        if self._sources.has_files_of(dataset, read=mapped == "read"):
            self._may_come_again("a file that is named twice")

    def look_at_tables(self) -> None:
        """Checks that no function has a table that may be the examples."""
        if self._most_rows >= self._sources.most_rows > 0:
            self._may_come_again("a map with a table of as many rows as there are examples")

    def _look_at_map(self, dataset: Any, level: int) -> None:
        function, source = dataset._map_func.function, dataset._inputs()[0]
        self._most_rows = max(self._most_rows, dataset_maps.most_rows(function))
        specs = tf.nest.flatten(source.element_spec)
        leaves = self._elements.of(source, level)
        shapes = [leaf.shape for leaf in leaves]
        varying = dataset_maps.varying_op(function) if level > 0 else None
        graphs = self._elements.graphs
        state = None if varying else dataset_maps.state_of(function, shapes, graphs)
        if state is not None:
            remedy = _KNOWN_SHAPE if state.endswith("of unknown shape") else _SAVE_FIRST
            self._note(f"a map that may keep state ({state})", remedy)
        elif any(isinstance(spec, tf.data.DatasetSpec) for spec in specs):
            self._note("a map of data sets", _SAVE_FIRST)
        if self.problem is not None:
            return
        if dataset_maps.looks_up_rows(function, shapes, int(source.cardinality()), graphs):
            self._may_come_again("a map that may choose examples by their numbers")
        if level == 1:
            self._look_at_map_of_batches(dataset, leaves, specs, varying)
        elif level > 1:
            self._note("a map of batches of batches", _MAP_FIRST)

    def _look_at_map_of_batches(
        self, dataset: Any, leaves: Any, specs: Any, varying: str | None
    ) -> None:
        if not all(isinstance(spec, tf.TensorSpec) for spec in specs):
            self._note("a map of batches that are ragged or sparse", _MAP_FIRST)
        elif varying in dataset_maps.PYTHON and all(leaf.rows is None for leaf in leaves):
            self._may_come_again("a function that makes whole batches")
        elif varying is not None:
            self._note(f"a map of batches that draws or calls Python ({varying})", _MAP_FIRST)
        elif any(leaf.rows is not None and not leaf.shape.rank for leaf in leaves):
            operation = "a map of batches, a part of which is of unknown shape or has no rows"
            self._note(operation, "Let `map` come before `batch`, and end in tf.ensure_shape.")
        else:
            self._elements.of(dataset, 1)
            mixing = self._elements.proofs[id(dataset)].mixing
            if mixing is not None:
                operation = f"a map of batches in which a row may depend on others ({mixing})"
                self._note(operation, _MAP_FIRST)


def _is_selected(size: Any) -> bool:
    """Returns whether a function has taken these rows from a table by numbers."""
    return isinstance(size, tuple) and size[0] == "selected"


def _are_numbers(dataset: Any) -> bool:
    """Returns whether a dataset consists of ranges and random numbers only.

    A dataset with a table does not: the table may hold the examples' labels.
    """
    try:
        graph = serialized(dataset)
    except tf.errors.OpError:
        return False
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return all(_makes_numbers(node) for node in nodes)


def _makes_numbers(node: Any) -> bool:
    if node.op == "Const":
        shape = tf.TensorShape(node.attr["value"].tensor.tensor_shape)
        return bool(shape.num_elements() <= _FEW_NUMBERS)
    if "Dataset" in node.op:
        return node.op in _NUMBER_OPS
    op_def = _op_defs.get(node.op)
    return node.op in _STATEFUL_NUMBERS or (op_def is not None and not op_def.is_stateful)


def _has_numbers_alone(dataset: Any) -> bool:
    """Returns whether the elements of a source are whole numbers, such as row numbers."""
    leaves = tf.nest.flatten(dataset.element_spec)
    return all(
        isinstance(leaf, tf.TensorSpec) and leaf.dtype.is_integer and leaf.shape.rank == 0
        for leaf in leaves
    )


def _plain(kind: str) -> str:
    """Converts the name of a dataset class to the name of its method."""
    words = kind.strip("_").removesuffix("Dataset").removeprefix("Parallel")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in words).strip("_")
