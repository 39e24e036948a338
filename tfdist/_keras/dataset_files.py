"""Checks that a `tf.data.Dataset` of files gives each record once, whatever records hold."""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable
from typing import Any

import tensorflow as tf

from tfdist._keras import dataset_maps
from tfdist._keras.datasets import copy_of

# Names of ops, in a function that makes a dataset of a file's name.
_READERS = frozenset(
    {"FixedLengthRecordDatasetV2", "TFRecordDataset", "TFRecordDatasetV2", "TextLineDataset"}
)
# TFRecordDataset and the like are themselves a flat_map over a list of names.
_LISTS = frozenset({"TensorDataset", "TensorSliceDataset"})
_FILE_OPS = _READERS | _LISTS | {"FlatMapDataset", "PrefetchDataset", "SkipDataset"}
_JOINS = frozenset({"FlatMapDataset", "InterleaveDataset", "ParallelInterleaveDatasetV4"})
_OF_SHARDS = _JOINS | {"PrefetchDataset", "ShuffleDatasetV3"}
_MOST_NAMES = 2**18


def reads_files(function: Any) -> bool:
    """Returns whether a function makes a dataset of a file, and uses no other one.

    Args:
        function: The function of a dataset.
    """
    ops = {node.op for node in dataset_maps.nodes(function) if "Dataset" in node.op}
    known = bool(ops & _READERS) and ops <= _FILE_OPS
    return known and not dataset_maps.captures_datasets(function)


def reads_alone(one: Any, function: Any) -> bool:
    """Returns whether a function of a file's name gives all records of the file, in their order.

    But for a number of them at the beginning, which is the same for each file.

    Args:
        one: The dataset that applies the function.
        function: The function.
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


def reads_its_argument(function: Any) -> bool:
    """Returns whether a function reads the one file that its argument names.

    Args:
        function: The function of a dataset of names.
    """
    graph = function.graph
    lists = [op for op in graph.get_operations() if op.type in _LISTS]
    if len(lists) != 1 or any(op.type in _READERS for op in graph.get_operations()):
        return False
    for inner in graph.as_graph_def().library.function:
        given = [arg.name for arg in inner.signature.input_arg]
        if any(node.input[0] not in given for node in inner.node_def if node.op in _READERS):
            return False
    name = lists[0].inputs[0]
    while name.op.type in ("ExpandDims", "Identity", "Reshape", "StringJoin"):
        varying = [t for t in name.op.inputs if tf.get_static_value(t) is None]
        if len(varying) != 1:
            return False
        name = varying[0]
    return any(
        name is given for given in graph.inputs[: len(graph.inputs) - len(graph.captures)]
    )


def names_twice(names: Any, seen: set[Hashable]) -> bool:
    """Returns whether a dataset of files' names may give a file twice.

    Args:
        names: The dataset. It is read from a copy, so that its shuffles stay where they are.
        seen: The paths, or numbers, of other files. Those of these files are added.
    """
    count = 0
    try:
        for name in itertools.islice(copy_of(names).as_numpy_iterator(), _MOST_NAMES):
            if is_seen(name, seen):
                return True
            count += 1
    except (tf.errors.OpError, TypeError):
        return True
    return count >= _MOST_NAMES


def is_seen(name: bytes, seen: set[Hashable]) -> bool:
    """Returns whether a file is among others, and adds it to them.

    Args:
        name: Its name.
        seen: The paths, or numbers, of the others.
    """
    path: Hashable = name
    if b"://" not in name:
        path = os.path.realpath(name)
        if os.path.exists(path):
            status = os.stat(path)  # a file may have several paths
            path = (status.st_dev, status.st_ino)
    known = path in seen
    seen.add(path)
    return known


def saved_spec(one: Any) -> Any:
    """Reads what a saved dataset says of its elements. `element_spec=` is a claim.

    Args:
        one: The dataset of `Dataset.load`.
    """
    return tf.data.Dataset.load(one._path, compression=one._compression).element_spec


def loads_all(one: Any) -> bool:
    """Returns whether a saved dataset is loaded with each of its elements once.

    Args:
        one: The dataset of `Dataset.load`.
    """
    function = one._reader_func.function
    ops = function.graph.get_operations()
    made = [op for op in ops if "Dataset" in op.type]
    joins = [op for op in made if op.type in _JOINS]
    if len(joins) != 1 or not all(op.type in _OF_SHARDS for op in made):
        return False
    if any(
        op.type.startswith("Parallel") and op.get_attr("deterministic") == b"false"
        for op in joins
    ):
        return False
    library = function.graph.as_graph_def().library.function
    return all(node.op in ("Identity", "NoOp") for f in library for node in f.node_def)
