"""Checks that a `tf.data.Dataset` of files returns each record once, whatever it contains."""

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
    """Returns whether a function makes a dataset of a file, and uses no other dataset.

    Args:
        function: The function of a dataset.
    """
    ops = {node.op for node in dataset_maps.nodes(function) if "Dataset" in node.op}
    reads_a_file = bool(ops & _READERS) and ops <= _FILE_OPS
    return reads_a_file and not dataset_maps.captures_datasets(function)


def reads_alone(dataset: Any, function: Any) -> bool:
    """Returns whether a function of a file's name returns all of the file's records, in order.

    It may skip a fixed number of records at the beginning.

    Args:
        dataset: The dataset that applies the function.
        function: The function.
    """
    names = tf.nest.flatten(dataset._inputs()[0].element_spec)
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
        arguments = [arg.name for arg in inner.signature.input_arg]
        readers = [node for node in inner.node_def if node.op in _READERS]
        if any(node.input[0] not in arguments for node in readers):
            return False
    # Follows the name of the file back to the argument, through ops that keep it one name, such
    # as a join with a constant folder.
    name = lists[0].inputs[0]
    while name.op.type in ("ExpandDims", "Identity", "Reshape", "StringJoin"):
        varying = [t for t in name.op.inputs if tf.get_static_value(t) is None]
        if len(varying) != 1:
            return False
        name = varying[0]
    own_inputs = graph.inputs[: len(graph.inputs) - len(graph.captures)]
    return any(name is tensor for tensor in own_inputs)


def names_twice(names: Any, paths: set[Hashable]) -> bool:
    """Returns whether a dataset of files' names may name a file twice.

    Args:
        names: The dataset. A copy of it is read, so that its shuffles do not advance.
        paths: The paths, or inode numbers, of other files. Those of these files are added.
    """
    count = 0
    try:
        for name in itertools.islice(copy_of(names).as_numpy_iterator(), _MOST_NAMES):
            if is_seen(name, paths):
                return True
            count += 1
    except (tf.errors.OpError, TypeError):
        return True
    return count >= _MOST_NAMES


def is_seen(name: bytes, paths: set[Hashable]) -> bool:
    """Returns whether a file is among others, and adds it to them.

    Args:
        name: Its name.
        paths: The paths, or inode numbers, of the others.
    """
    path: Hashable = name
    if b"://" not in name:
        path = os.path.realpath(name)
        if os.path.exists(path):
            status = os.stat(path)  # a file may have several paths
            path = (status.st_dev, status.st_ino)
    is_repeated = path in paths
    paths.add(path)
    return is_repeated


def saved_spec(dataset: Any) -> Any:
    """Reads the element spec of a saved dataset from its files.

    `element_spec=` of `Dataset.load` is only a claim of the user.

    Args:
        dataset: The dataset of `Dataset.load`.
    """
    return tf.data.Dataset.load(dataset._path, compression=dataset._compression).element_spec


def loads_all(dataset: Any) -> bool:
    """Returns whether a saved dataset is loaded with each of its elements once.

    Args:
        dataset: The dataset of `Dataset.load`.
    """
    function = dataset._reader_func.function
    ops = function.graph.get_operations()
    dataset_ops = [op for op in ops if "Dataset" in op.type]
    joins = [op for op in dataset_ops if op.type in _JOINS]
    if len(joins) != 1 or not all(op.type in _OF_SHARDS for op in dataset_ops):
        return False
    if any(
        op.type.startswith("Parallel") and op.get_attr("deterministic") == b"false"
        for op in joins
    ):
        return False
    library = function.graph.as_graph_def().library.function
    return all(node.op in ("Identity", "NoOp") for f in library for node in f.node_def)
