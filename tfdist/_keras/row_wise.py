"""Proves that each row of a mapped batch depends on the same row of the batch alone.

The proof reads the graph of the function. Trying the function on a batch would say nothing of
other batches. Only operations that are known to keep rows apart pass.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist._keras.inlined import InlinedGraphs

# One value for one value.
_UNARY = frozenset(
    {
        "Abs", "Acos", "Asin", "AsString", "Atan", "Cast", "Ceil", "Cos", "Cosh", "Elu",
        "EnsureShape", "Erf", "Exp", "Expm1", "Floor", "Identity", "Inv", "IsFinite", "IsInf",
        "IsNan", "LeakyRelu", "Log", "Log1p", "LogicalNot", "Neg", "OnesLike", "Reciprocal",
        "RegexFullMatch", "Relu", "Relu6", "Rint", "Round", "Rsqrt", "Selu", "Sigmoid",
        "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Square",
        "StaticRegexFullMatch", "StaticRegexReplace", "StopGradient", "StringLength",
        "StringLower", "StringStrip", "StringToHashBucketFast", "StringToNumber",
        "StringUpper", "Tan", "Tanh", "ZerosLike",
    }
)  # fmt: skip
_BROADCAST = frozenset(
    {
        "Add", "AddV2", "Atan2", "ClipByValue", "Div", "DivNoNan", "Equal", "FloorDiv",
        "FloorMod", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd", "LogicalOr",
        "Maximum", "Minimum", "Mod", "Mul", "MulNoNan", "NotEqual", "Pow", "RealDiv",
        "SelectV2", "SquaredDifference", "Sub", "TruncateDiv", "TruncateMod", "Xdivy", "Xlogy",
    }
)  # fmt: skip
_OF_SIZES = frozenset({"Rank", "Shape", "Size"})
# The second input has the axes along which they work.
_ALONG = frozenset(
    {
        "All", "Any", "ArgMax", "ArgMin", "Cumprod", "Cumsum", "Max", "Mean", "Min", "Prod",
        "ReverseV2", "Sum",
    }
)  # fmt: skip
# The first input has rows, all others are the same for every batch.
_FIRST_HAS_ROWS = frozenset(
    {"BiasAdd", "MatMul", "ResizeBicubic", "ResizeBilinear", "ResizeNearestNeighbor"}
)
# The least rank with which they work along other axes than the first.
_OF_LAST_AXES = {
    "AdjustContrastv2": 4, "AdjustHue": 2, "AdjustSaturation": 2, "HSVToRGB": 2,
    "LogSoftmax": 2, "RGBToHSV": 2, "Softmax": 2, "TopKV2": 2,
}  # fmt: skip
_SELECTS = frozenset({"GatherV2", "Slice", "StridedSlice"})
_OF_NUMBERS = _UNARY | _BROADCAST | {"ConcatV2", "ExpandDims", "Fill", "Pack", "Range"}
_FEW = 16  # a constant with more numbers may hold examples


@dataclass(frozen=True)
class Leaf:
    """The proven properties of a part of a data set's elements.

    Attributes:
        shape: The proven shape.
        rows: Parts with equal `rows` have equally many rows in every element. None if the part
            holds no examples, such as a count.
    """

    shape: Any
    rows: Hashable | None

    @property
    def size(self) -> Hashable | None:
        """The number of rows if it is always the same, else `rows`."""
        if self.rows is None or not self.shape.rank or self.shape[0] is None:
            return self.rows
        return int(self.shape[0])


@dataclass(frozen=True)
class Proof:
    """The result of a proof.

    Attributes:
        mixing: The type of an operation that is not known to keep rows apart, or None.
        outputs: The outputs of the function, if `mixing` is None.
    """

    mixing: str | None
    outputs: tuple[Leaf, ...] = ()


def proof(function: Any, leaves: Sequence[Leaf], graphs: InlinedGraphs) -> Proof:
    """Looks for an operation that is not known to keep the rows of a batch apart.

    Args:
        function: The function of a dataset that maps batches.
        leaves: Its arguments. The first axis of arguments with `rows` is that of rows.
        graphs: The inlined graphs of the pipeline.
    """
    try:
        graph = graphs.of(function, [leaf.shape for leaf in leaves])
    except ValueError:
        return Proof("set_shape")
    # The proof goes through the operations in order, and sorts tensors by name. `rows`: tensors
    # whose first axis is that of rows. `numbers`: tensors that depend on parts without
    # examples, such as counts. `sizes`: shapes and numbers of rows. Other tensors are the same
    # for every batch.
    rows: dict[str, Leaf] = {}
    numbers: set[str] = set()
    sizes: dict[str, Hashable | None] = {}
    for tensor, leaf in zip(graph.elements, leaves, strict=True):
        if leaf.rows is None:
            numbers.add(tensor.name)
        elif not tensor.shape.rank:
            return Proof("Placeholder")
        else:
            rows[tensor.name] = leaf
    for op in graph.ops:
        has_rows = any(t.name in rows for t in op.inputs)
        has_numbers = any(t.name in numbers for t in op.inputs)
        if op.type in _OF_SIZES or not (has_rows or has_numbers):
            # The output is the same for every batch with as many rows.
            size = _size_of(op, rows, sizes)
            if size is not None and op.type == "Fill":
                rows[op.outputs[0].name] = Leaf(op.outputs[0].shape, size)
            elif size is not None:
                sizes[op.outputs[0].name] = size
            continue
        if not has_rows and not _selects(op, numbers):
            if not _makes_numbers(op, numbers):
                return Proof(str(op.type))
            numbers.update(t.name for t in op.outputs)
            continue
        size = _rows_of(op, rows, sizes) if has_rows else ("selected", op.name)
        for output in op.outputs:
            if size is None or not output.shape.rank:
                return Proof(str(op.type))
            rows[output.name] = Leaf(output.shape, size)
    return Proof(None, tuple(rows.get(t.name, Leaf(t.shape, None)) for t in graph.outputs))


def _selects(op: Any, numbers: Collection[str]) -> bool:
    """Returns whether an operation takes rows from a table by numbers."""
    return op.type in _SELECTS and op.inputs[0].name not in numbers


def _makes_numbers(op: Any, numbers: Collection[str]) -> bool:
    """Returns whether an operation on numbers cannot return examples of a table."""
    are_small = all(
        t.name in numbers or (t.shape.num_elements() or _FEW + 1) <= _FEW for t in op.inputs
    )
    return are_small and op.type in _OF_NUMBERS


def _size_of(
    op: Any, rows: Mapping[str, Leaf], sizes: Mapping[str, Hashable | None]
) -> Hashable | None:
    """Returns `Leaf.rows` of tensors whose number of rows an operation computes, or None.

    The operation returns the shape of such a tensor, its number of rows, or a shape that begins
    with this number.
    """
    first = op.inputs[0].name if op.inputs else ""
    if op.type == "Shape":
        return rows[first].rows if first in rows else None
    if op.type == "StridedSlice" and op.get_attr("shrink_axis_mask") == 1:
        begin = _constant(op.inputs[1])
        return sizes.get(first) if begin is not None and begin.tolist() == [0] else None
    if op.type == "Pack" and op.inputs[0].shape.rank == 0:
        return sizes.get(first)
    return sizes.get(first) if op.type == "Fill" and op.outputs[0].shape.rank else None


def _rows_of(
    op: Any, rows: Mapping[str, Leaf], sizes: Mapping[str, Hashable | None]
) -> Hashable | None:
    """Returns `Leaf.rows` of an operation's outputs, or None if it may mix rows."""
    leaves = [rows[t.name] for t in op.inputs if t.name in rows]
    if op.type == "Reshape" and op.inputs[1].name not in rows:
        # With as many rows as before, and row-major order, each row keeps its numbers.
        size = sizes.get(op.inputs[1].name)
        if size is not None and size == leaves[0].rows:
            return size
    are_equal = len({leaf.size for leaf in leaves}) == 1
    return leaves[0].rows if are_equal and _keeps_rows(op, rows) else None


def _keeps_rows(op: Any, rows: Mapping[str, Leaf]) -> bool:
    """Returns whether each row of an operation's outputs depends on one row of its inputs."""
    kind, inputs = op.type, list(op.inputs)
    has_rows = [t.name in rows for t in inputs]
    if kind in _UNARY:
        return not any(has_rows[1:])
    if kind in _BROADCAST:
        return _broadcasts_by_row(inputs, rows)
    if kind == "ConcatV2":
        *parts, axis = inputs
        ranks = {t.shape.rank for t in parts}
        return all(has_rows[:-1]) and len(ranks) == 1 and _avoids_rows(axis, ranks.pop())
    if kind == "Pack":
        ranks = {t.shape.rank for t in inputs}
        axis = op.get_attr("axis") % (inputs[0].shape.rank + 1)
        return all(has_rows) and len(ranks) == 1 and axis >= 1
    if kind in ("GatherV2", "ResourceGather", "LookupTableFindV2"):
        return _looks_up(op, has_rows)
    if kind == "BatchMatMulV2":  # it multiplies along the last two axes
        return inputs[0].shape.rank >= 3 and _broadcasts_by_row(inputs, rows)
    if kind in ("Split", "SplitV"):
        value, axis = (1, 0) if kind == "Split" else (0, 2)
        only_value = has_rows[value] and sum(has_rows) == 1
        return only_value and _avoids_rows(inputs[axis], inputs[value].shape.rank)
    only_first = has_rows[0] and not any(has_rows[1:])
    return only_first and (_works_by_row(op, inputs) or _keeps_first_axis(op, inputs))


def _works_by_row(op: Any, inputs: Sequence[Any]) -> bool:
    """Returns whether an operation combines numbers along other axes than the first one."""
    kind, rank = op.type, inputs[0].shape.rank
    if kind in _FIRST_HAS_ROWS:
        return kind != "MatMul" or not bool(op.get_attr("transpose_a"))
    if kind in _OF_LAST_AXES:
        return bool(rank >= _OF_LAST_AXES[kind])
    if kind in _ALONG:
        return _avoids_rows(inputs[1], rank)
    if kind == "Roll":
        return _avoids_rows(inputs[2], rank)
    if kind == "ParseExampleV2":
        shapes = [tf.TensorShape(shape) for shape in op.get_attr("dense_shapes")]
        is_dense = not op.get_attr("sparse_types") and not op.get_attr("ragged_value_types")
        # Features of unknown size are padded to the longest one of the batch.
        return is_dense and all(shape.is_fully_defined() for shape in shapes)
    return False


def _keeps_first_axis(op: Any, inputs: Sequence[Any]) -> bool:
    """Returns whether an operation that changes the shape of a tensor keeps its rows."""
    kind, rank = op.type, inputs[0].shape.rank
    if kind == "OneHot":
        axis = op.get_attr("axis")
        return bool(axis == -1 or axis >= 1)
    if kind == "ExpandDims":
        return _avoids_rows(inputs[1], rank + 1)
    if kind == "Squeeze":
        axes = list(op.get_attr("squeeze_dims"))
        return bool(axes) and all(axis % rank >= 1 for axis in axes)
    if kind == "Unpack":
        return bool(op.get_attr("axis") % rank >= 1)
    if kind == "Transpose":
        order = _constant(inputs[1])
        return order is not None and int(order.ravel()[0]) == 0
    if kind in ("Pad", "PadV2", "MirrorPad", "Tile"):
        amounts = _constant(inputs[1])
        unchanged = 1 if kind == "Tile" else 0
        return amounts is not None and bool(np.all(amounts[0] == unchanged))
    if kind == "Reshape":
        old, new = inputs[0].shape[1:], op.outputs[0].shape[1:]
        are_known = old.is_fully_defined() and new.is_fully_defined()
        # A row keeps its numbers if rows have as many numbers as before.
        return bool(are_known and old.num_elements() == new.num_elements() > 0)
    if kind == "StridedSlice":
        return _slices_other_axes(op, inputs)
    return False


def _slices_other_axes(op: Any, inputs: Sequence[Any]) -> bool:
    """Returns whether a slice such as `x[:, 1:]` or `x[..., 0]` takes all rows, in order."""
    strides = _constant(inputs[3])
    if strides is None or not strides.size:
        return False
    if op.get_attr("ellipsis_mask") & 1:
        # The ellipsis stands for at least the first axis.
        new_axes = bin(op.get_attr("new_axis_mask")).count("1")
        return bool(strides.size - 1 - new_axes < inputs[0].shape.rank)
    takes_all = op.get_attr("begin_mask") & 1 and op.get_attr("end_mask") & 1
    moves_axis = (op.get_attr("new_axis_mask") | op.get_attr("shrink_axis_mask")) & 1
    return bool(takes_all and not moves_axis and strides[0] == 1)


def _broadcasts_by_row(inputs: Sequence[Any], rows: Mapping[str, Leaf]) -> bool:
    """Returns whether broadcasting combines each row with the same row of other inputs.

    All inputs with rows must have the same rank. Other inputs must have a lower rank, or one
    row for all. Otherwise a single row of the batch could be broadcast to several rows.
    """
    with_rows = {t.shape.rank for t in inputs if t.name in rows}
    without_rows = [t.shape for t in inputs if t.name not in rows]
    if len(with_rows) != 1 or any(shape.rank is None for shape in without_rows):
        return False
    (rank,) = with_rows
    return all(s.rank < rank or (s.rank == rank and s[0] == 1) for s in without_rows)


def _looks_up(op: Any, has_rows: Sequence[bool]) -> bool:
    """Returns whether each row looks up values in a table that is the same for every batch."""
    if op.type == "GatherV2":
        axis = _constant(op.inputs[2])
        is_by_row = op.get_attr("batch_dims") == 0 and axis is not None and int(axis) == 0
        return list(has_rows) == [False, True, False] and is_by_row
    if op.type == "ResourceGather":
        return list(has_rows) == [False, True] and op.get_attr("batch_dims") == 0
    return list(has_rows) == [False, True, False]


def _avoids_rows(axis: Any, rank: int) -> bool:
    """Returns whether axes are constants, and none of them is the first one."""
    axes = _constant(axis)
    if axes is None or not axes.size:
        return False
    return bool(np.all(axes.ravel() % rank >= 1))


def _constant(tensor: Any) -> Any:
    value = tf.get_static_value(tensor)
    return None if value is None else np.asarray(value)
