"""The calls of layers that a team computes in parts.

Each takes the place of a layer's `call` while weights are in parts. What a team cannot compute
together, such as a call in a loop, the layer computes by itself: it gathers its weights then.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist._keras.replica import Tensor, current_batch
from tfdist._keras.sharded_weights import InParts
from tfdist._keras.slices import is_of_no_example
from tfdist._keras.teams import Links, Team, drawing_columns, team_of

_running = threading.local()


class ParallelCall:
    """Takes the place of a layer's `call`.

    Args:
        layer: A built `keras.Layer`.
        links: The collectives of its team.
    """

    def __init__(self, layer: Any, links: Links) -> None:
        functools.update_wrapper(self, layer.call)  # type: ignore[arg-type]
        self.layer = layer
        self.links = links
        self.original = layer.call


class ColumnCall(ParallelCall):
    """A Dense or EinsumDense whose output columns are divided.

    Args:
        layer: The layer.
        links: As in `ParallelCall`.
        axis: The axis of these columns in the output, a negative number.
        cut_in: The functional model in which they stay divided, or None.
    """

    def __init__(self, layer: Any, links: Links, axis: int, cut_in: Any = None) -> None:
        super().__init__(layer, links)
        self.axis = axis
        self.cut_in = cut_in

    def __call__(self, inputs: Any, training: Any = None) -> Any:
        batch, layer, team = current_batch(), self.layer, team_of(self.links, inputs)
        if batch is not None:
            batch.cut_outputs.discard(id(layer))
        if team is None or batch is None:
            return self.original(inputs, training=training)
        outputs = product(layer, team.gathered(inputs), own_weight(layer, layer._kernel))
        stays = self.cut_in is not None and self.cut_in in running("models")
        adds_own = layer.bias is not None and (stays or is_divided(layer.bias))
        if adds_own:
            outputs += own_bias(layer, team, self.axis)
        if stays:
            batch.cut_outputs.add(id(layer))
        else:
            outputs = team.in_rows(outputs, self.axis)
        if layer.bias is not None and not adds_own:
            outputs = keras.ops.add(outputs, layer.bias)
        return activated(layer, outputs)


class RowCall(ParallelCall):
    """A Dense or EinsumDense whose input columns are divided.

    Args:
        layer: The layer.
        links: As in `ParallelCall`.
        axis: The axis of these columns in the input, a negative number.
        source: The layer whose output may have the replica's columns alone, or None.
    """

    def __init__(self, layer: Any, links: Links, axis: int, source: Any = None) -> None:
        super().__init__(layer, links)
        self.axis = axis
        self.source = source

    def __call__(self, inputs: Any, training: Any = None) -> Any:
        layer, team = self.layer, team_of(self.links, inputs)
        if team is None:
            return self.original(inputs, training=training)
        if not is_cut_output(self.source):
            inputs = team.in_columns(inputs, self.axis)
        outputs = team.summed(product(layer, inputs, own_weight(layer, layer._kernel)))
        if layer.bias is not None:
            outputs = keras.ops.add(outputs, layer.bias)
        return activated(layer, outputs)


class BetweenCall(ParallelCall):
    """A layer between two that are divided, which treats each element by itself.

    Args:
        layer: The layer.
        links: As in `ParallelCall`.
        source: The layer whose output may have the replica's columns alone.
        axis: Their axis.
    """

    def __init__(self, layer: Any, links: Links, source: Any, axis: int) -> None:
        super().__init__(layer, links)
        self.source = source
        self.axis = axis

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        team = team_of(self.links, inputs)
        if team is None or not is_cut_output(self.source):
            return self.original(inputs, *args, **kwargs)
        with drawing_columns(team, self.axis):
            return self.original(inputs, *args, **kwargs)


class EmbeddingCall(ParallelCall):
    """An Embedding whose table is divided.

    Args:
        layer: The layer.
        links: As in `ParallelCall`.
        axis: 0 if rows are divided, 1 for columns.
    """

    def __init__(self, layer: Any, links: Links, axis: int) -> None:
        super().__init__(layer, links)
        self.axis = axis

    def __call__(self, inputs: Any) -> Any:
        team = team_of(self.links, inputs)
        if team is None:
            return self.original(inputs)
        ids = inputs if inputs.dtype in (tf.int32, tf.int64) else tf.cast(inputs, tf.int32)
        # Rows of positions are summed over replicas; those of words are not (`slices`).
        is_fixed = is_of_no_example(ids) and len(ids.shape) == 1
        ids = ids if is_fixed else team.gathered(ids)
        table = own_weight(self.layer, self.layer._embeddings, casts=False)
        if self.axis == 1:
            outputs = tf.gather(table, ids)
            if is_fixed:  # each column has one owner
                found = _placed(team, outputs)
                return tf.cast(team.summed_copies(found), self.layer.compute_dtype)
            outputs = team.in_rows(outputs, -1)
            return tf.cast(outputs, self.layer.compute_dtype)
        rows = table.shape[0]
        own = ids - tf.cast(team.links.member() * rows, ids.dtype)
        is_own = (own >= 0) & (own < rows)
        own_rows = tf.gather(table, tf.clip_by_value(own, 0, rows - 1))
        own_rows = tf.where(is_own[..., None], own_rows, tf.zeros_like(own_rows))
        outputs = team.summed_copies(own_rows) if is_fixed else team.summed(own_rows)
        return tf.cast(outputs, self.layer.compute_dtype)


def _placed(team: Team, columns: Tensor) -> Tensor:
    """Returns all columns, with zeros for those of other members."""
    ways = team.links.ways
    is_own = tf.one_hot(team.links.member(), ways, dtype=columns.dtype)
    spread = columns[..., None, :] * is_own[:, None]
    shape = tf.concat([tf.shape(columns)[:-1], [ways * columns.shape[-1]]], 0)
    return tf.ensure_shape(
        tf.reshape(spread, shape), [*columns.shape[:-1], ways * columns.shape[-1]]
    )


class RunningCall(ParallelCall):
    """A functional model, some of whose layers pass on the own columns alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with noting("models", self.layer):
            return self.original(*args, **kwargs)


def running(kind: str) -> Sequence[Any]:
    """Lists what this thread runs, the innermost last.

    Args:
        kind: "models" or "attentions".
    """
    found: Sequence[Any] = getattr(_running, kind, ())
    return found


@contextlib.contextmanager
def noting(kind: str, layer: Any) -> Iterator[None]:
    """Makes a context in which a layer runs.

    Args:
        kind: As in `running`.
        layer: The layer.
    """
    before = running(kind)
    setattr(_running, kind, (*before, layer))
    try:
        yield
    finally:
        setattr(_running, kind, before)


def is_cut_output(source: Any) -> bool:
    """Tells whether the last output of a layer has the replica's columns alone.

    Args:
        source: A `keras.Layer` or None.
    """
    batch = current_batch()
    return batch is not None and source is not None and id(source) in batch.cut_outputs


def product(layer: Any, inputs: Tensor, kernel: Tensor) -> Tensor:
    """Multiplies inputs by a kernel, as a Dense or EinsumDense does.

    Args:
        layer: The layer.
        inputs: Its inputs.
        kernel: All of its kernel, or a part.
    """
    if isinstance(layer, keras.layers.EinsumDense):
        return keras.ops.einsum(layer.equation, inputs, kernel)
    return keras.ops.matmul(inputs, kernel)


def activated(layer: Any, outputs: Tensor) -> Tensor:
    """Applies a layer's activation.

    Args:
        layer: A Dense or EinsumDense.
        outputs: What goes into it.
    """
    return outputs if layer.activation is None else layer.activation(outputs)


def is_divided(variable: Any) -> bool:
    """Tells whether each member of a team has its own slice of a weight.

    Args:
        variable: A `keras.Variable`.
    """
    value = variable._value
    return isinstance(value, InParts) and value.is_divided


def own_weight(layer: Any, variable: Any, casts: bool = True) -> Tensor:
    """Reads the replica's slice of a weight. Tapes take the gradient of the slice.

    Args:
        layer: The layer that reads it.
        variable: A divided weight.
        casts: Whether the slice is converted to the type in which the layer computes.
    """
    batch, backing = current_batch(), variable._value
    assert batch is not None
    part = tf.identity(tf.convert_to_tensor(backing.part))
    batch.own_reads.setdefault(id(backing), []).append(part)
    return tf.cast(part, layer.compute_dtype) if casts else part


def own_bias(layer: Any, team: Team, axis: int) -> Tensor:
    """Returns the replica's columns of a bias.

    Args:
        layer: The layer.
        team: The team.
        axis: The axis of the columns in the layer's output, a negative number.
    """
    bias = layer.bias
    if is_divided(bias):
        return own_weight(layer, bias)
    whole = tf.cast(keras.ops.convert_to_tensor(bias), layer.compute_dtype)
    if len(bias.shape) < -axis or bias.shape[axis] == 1:
        return whole
    return team.own(whole, len(bias.shape) + axis)
