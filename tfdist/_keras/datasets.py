"""The order of a user's `tf.data.Dataset`: what it depends on, and copies with a fixed order.

The state of a shuffle belongs to its dataset. All iterators advance it, by as much as their
buffers read ahead. A copy through the dataset's graph has a state of its own, which starts at
the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.data.ops import dataset_ops as _dataset_ops

from tfdist._keras.discovery import RANDOM_OPS

# Inputs of the ops that shuffle: where their seeds are, and the generator of later seeds.
_SHUFFLES = {"ShuffleDatasetV3": ((2, 3), 4), "ShuffleAndRepeatDatasetV2": ((2, 3), 5)}
_MAP_ATTRIBUTES = (  # those of "ParallelMapDatasetV2" that "MapDataset" has too
    "f", "Targuments", "output_types", "output_shapes", "use_inter_op_parallelism",
    "preserve_cardinality", "metadata",
)  # fmt: skip
_IGNORE_STATE = 1  # of lookup tables, which are shared, and of random ops, which begin anew


def reshuffles_ahead(dataset: Any) -> bool:
    """Returns whether a dataset itself repeats a dataset that is reshuffled each time.

    Then the state of the shuffle depends on how far buffers have read ahead.

    Args:
        dataset: A `tf.data.Dataset`.
    """
    return any(
        _is(upstream, "Repeat")
        and any(_is_reshuffling(earlier) for earlier in _upstream(upstream))
        for upstream in _upstream(dataset)
    )


def repetitions(dataset: Any) -> list[tuple[int, bool]]:
    """Lists the repetitions within a dataset.

    Args:
        dataset: A `tf.data.Dataset` of batches.

    Returns:
        For each repetition the number of elements that it repeats, negative if unknown, and
        whether a later operation batches them.
    """
    repeats: list[tuple[int, bool]] = []

    def look(node: Any, is_batched: bool) -> None:
        inputs = node._inputs()
        if _is(node, "Repeat") or _is(node, "ShuffleAndRepeat"):
            repeats.append((int(inputs[0].cardinality()), is_batched))
        for source in inputs:
            look(source, is_batched or "Batch" in type(node).__name__)

    look(dataset, False)
    return repeats


def draws_in_parallel(dataset: Any) -> str | None:
    """Names an operation that draws random numbers for several elements in parallel, if any.

    The assignment of numbers to elements then differs from run to run.

    Args:
        dataset: A `tf.data.Dataset`.
    """
    for upstream in _upstream(dataset):
        random_ops = RANDOM_OPS & _ops(upstream) if _is(upstream, "ParallelMap") else ()
        if random_ops:
            return sorted(random_ops)[0]
    return None


def may_differ(dataset: Any) -> list[str]:
    """Names operations that may give other elements, or another order, in another process.

    Args:
        dataset: A `tf.data.Dataset`.
    """
    causes: dict[str, None] = {}  # an ordered set
    for upstream in _upstream(dataset):
        ops = _ops(upstream)
        if _is(upstream, "Shuffle"):
            causes["shuffle"] = None
        if ops & {"PyFunc", "PyFuncStateless", "EagerPyFunc"}:
            causes["a Python function (from_generator, py_function or numpy_function)"] = None
        if ops & RANDOM_OPS:
            causes["a map that draws random numbers"] = None
    return list(causes)


def _ops(dataset: Any) -> set[str]:
    """Names the ops of the function that a dataset applies, if there is one."""
    function = getattr(getattr(dataset, "_map_func", None), "function", None)
    if function is None:
        return set()
    definition = function.graph.as_graph_def()
    nested = [node for f in definition.library.function for node in f.node_def]
    return {node.op for node in [*definition.node, *nested]}


def _upstream(dataset: Any) -> Iterator[Any]:
    yield dataset
    for source in dataset._inputs():
        yield from _upstream(source)


def _is(dataset: Any, name: str) -> bool:
    return type(dataset).__name__ == f"_{name}Dataset"


def _is_reshuffling(dataset: Any) -> bool:
    return _is(dataset, "Shuffle") and bool(dataset._reshuffle_each_iteration)


def copy_of(dataset: Any, number: int = 0) -> Any:
    """Copies a dataset. The copy has its own order, which starts at the beginning.

    It draws random numbers sequentially. It shares tables, generators and Python functions
    with the original.

    Args:
        dataset: A `tf.data.Dataset`.
        number: Copies with different numbers have different shuffles. Copy 0 shuffles as the
            original does.

    Returns:
        A `tf.data.Dataset`.

    Raises:
        tf.errors.OpError: The dataset cannot be serialized, for instance for its size.
    """
    graph = serialized(dataset)
    functions = {function.signature.name: function for function in graph.library.function}
    for nodes in (graph.node, *(f.node_def for f in functions.values())):
        by_name = {node.name: node for node in nodes}
        for node in nodes:
            if node.op in _SHUFFLES:
                _set_seed(node, by_name, number)
            elif node.op == "ParallelMapDatasetV2" and _is_random(node, functions):
                _make_sequential(node)
    variant = tf.raw_ops.DatasetFromGraph(graph_def=graph.SerializeToString())
    return _dataset_ops._VariantDataset(variant, dataset.element_spec)


def serialized(dataset: Any) -> Any:
    """Serializes a dataset as a graph.

    Args:
        dataset: A `tf.data.Dataset`.

    Raises:
        tf.errors.OpError: The dataset cannot be serialized, for instance for its size.
    """
    graph = tf.raw_ops.DatasetToGraphV2(
        input_dataset=dataset._variant_tensor,
        external_state_policy=_IGNORE_STATE,
        strip_device_assignment=False,
    )
    return tf.compat.v1.GraphDef.FromString(graph.numpy())


def _set_seed(node: Any, by_name: dict[str, Any], number: int) -> None:
    """Gives a shuffle its own generator of seeds, and seeds that depend on a number."""
    seeds, generator = _SHUFFLES[node.op]
    # The generator belongs to the original, and would advance with it. With a dummy in its
    # place, a shuffle makes a generator of its own from its constant seeds.
    handle = by_name.get(node.input[generator].partition(":")[0])
    if handle is not None and handle.op == "Const":
        handle.op = "DummySeedGenerator"
        handle.attr.clear()
    if number:
        for index in seeds:
            constant = by_name.get(node.input[index].partition(":")[0])
            if constant is not None and constant.op == "Const":
                value = int(tf.make_ndarray(constant.attr["value"].tensor))
                moved = (value + number * 0x9E3779B1) % 2**31
                constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(moved, tf.int64))


def _is_random(node: Any, functions: dict[str, Any]) -> bool:
    names, visited = [node.attr["f"].func.name], set()
    while names:
        name = names.pop()
        if name in visited or name not in functions:
            continue
        visited.add(name)
        for inner in functions[name].node_def:
            if inner.op in RANDOM_OPS:
                return True
            names += [a.func.name for a in inner.attr.values() if a.HasField("func")]
    return False


def _make_sequential(node: Any) -> None:
    """Turns a parallel map into a sequential one, without the number of parallel calls."""
    node.op = "MapDataset"
    # The number of parallel calls is the last input that is no control input.
    del node.input[len([i for i in node.input if not i.startswith("^")]) - 1]
    for name in [name for name in node.attr if name not in _MAP_ATTRIBUTES]:
        del node.attr[name]
