"""A pipeline's micro-batches, and what a stage computes of one of them; see `piped`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf
from keras.src.models.functional import operation_fn as _operation_fn

from tfdist._keras.model_graph import LayerCall, seed_states
from tfdist._keras.recomputed_state import SecondPass
from tfdist._keras.replica import ReplicaBatch, current_batch, on_replica
from tfdist.errors import ArgumentError

Tensor = Any


@dataclass(frozen=True)
class PipedStage:
    """The calls that one device makes.

    Attributes:
        device: The device's name.
        calls: The calls, in their order.
        takes: The ids of the tensors that they need: of the stage before, or inputs.
        gives: The ids of the tensors that later stages or the model's outputs need.
    """

    device: str
    calls: tuple[LayerCall, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]

    @functools.cached_property
    def variables(self) -> list[Any]:
        """The variables of its layers, each once."""
        variables = [v for call in self.calls for v in call.variables]
        return list({id(v): v for v in variables}.values())

    @functools.cached_property
    def seeds(self) -> set[int]:
        """The ids of its variables that are states of random generators."""
        return seed_states([call.node.operation for call in self.calls])

    @property
    def trainable(self) -> list[int]:
        """The numbers of its variables that can be trained."""
        return [i for i, v in enumerate(self.variables) if v.trainable]


class MicroBatches:
    """The cut of a batch.

    A micro-batch without rows gets one, since not all ops can compute nothing. It is cut off
    the outputs, and its gradient is 0.

    Args:
        rows: Number of rows of the batch, a scalar int64 tensor.
        count: Number of micro-batches.
    """

    def __init__(self, rows: Tensor, count: int) -> None:
        self.count = count
        self._edges = [rows * number // count for number in range(count + 1)]

    def batch(self, number: int) -> ReplicaBatch:
        """Describes a micro-batch, for what draws random numbers.

        Args:
            number: Its number.
        """
        outer = current_batch()
        begin, rows = self._edges[number], self._edges[-1]
        first = tf.constant(0, tf.int64) if outer is None else outer.offset
        total = rows if outer is None else outer.total
        return ReplicaBatch(self.rows(number), total, first + begin, list, tf.identity)

    def rows(self, number: int) -> Tensor:
        """Returns the number of a micro-batch's own rows."""
        return self._edges[number + 1] - self._edges[number]

    def slice(self, tensor: Tensor, number: int) -> Tensor:
        """Returns the rows of a micro-batch, at least one.

        Args:
            tensor: A tensor of the batch.
            number: The micro-batch's number.
        """
        begin = tf.maximum(tf.minimum(self._edges[number], self._edges[-1] - 1), 0)
        return tensor[begin : tf.maximum(self._edges[number + 1], begin + 1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Joins tensors of all micro-batches."""
        own = [part[: self.rows(number)] for number, part in enumerate(parts)]
        return tf.concat(own, 0)

    def slice_gradient(self, gradient: Tensor, number: int) -> Tensor:
        """Returns a micro-batch's rows of a gradient; that of the row without number is 0."""
        own = gradient[self._edges[number] : self._edges[number + 1]]
        padding = tf.maximum(1 - self.rows(number), 0)
        return tf.pad(own, [[0, padding], *([[0, 0]] * (len(own.shape) - 1))])


@dataclass
class Unit:
    """One stage's computation of one micro-batch.

    Attributes:
        stage: The stage.
        batch: The micro-batch.
        values: The variables' values at the beginning of the step.
        taken: What it takes.
        masks: The masks of what it takes.
        results: What it gives.
        tape: The tape that has recorded it, if it is not computed again.
        changed: The variables' values afterwards, by id.
    """

    stage: PipedStage
    batch: ReplicaBatch
    values: list[Tensor]
    taken: list[Tensor]
    masks: list[Any]
    results: list[Tensor] = field(default_factory=list)
    tape: Any = None
    changed: dict[int, Tensor] = field(default_factory=dict)

    def call(
        self, taken: Sequence[Tensor], values: Sequence[Tensor], training: Any, context: Any
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Calls the stage's layers.

        Args:
            taken: What it takes.
            values: The variables' values.
            training: The argument `training` of the model's call.
            context: Other arguments that layers get.

        Returns:
            What the stage gives, and the values of the variables that the layers have changed.
        """
        stage = self.stage
        for tensor, mask in zip(taken, self.masks, strict=True):
            if mask is not None:
                tensor._keras_mask = mask
        tensors = dict(zip(stage.takes, taken, strict=True))
        initial = dict(zip(map(id, stage.variables), values, strict=True))
        scope = SecondPass(initial)
        with tf.device(stage.device), on_replica(self.batch), scope:
            for call in stage.calls:
                args, kwargs = call.node.arguments.fill_in(tensors)
                operation = _operation_fn(call.node.operation, training=training, **context)
                results = keras.tree.flatten(operation(*args, **kwargs))
                tensors.update(zip(call.makes, results, strict=True))
        if scope.losses:
            raise ArgumentError(
                "In a pipeline, layers must not add losses of their activations. Received: a "
                f"loss of one of the layers {', '.join(c.name for c in stage.calls)}. Leave "
                "activity_regularizer and add_loss out, or train without `Pipeline`."
            )
        values_now = scope.values.items()
        changed = {key: value for key, value in values_now if value is not initial.get(key)}
        return [tensors[key] for key in stage.gives], changed


def keep_changes(units: Sequence[Unit]) -> None:
    """Assigns what the first micro-batch of a stage has changed; all began with the same.

    Args:
        units: The stage's units.

    Raises:
        ArgumentError: A layer has changed something else than a seed.
    """
    stage = units[0].stage
    variables = {id(variable): variable for variable in stage.variables}
    for key in {key for unit in units for key in unit.changed}:
        if key not in stage.seeds:
            name = variables[key].path if key in variables else "of no layer"
            raise ArgumentError(
                "In a pipeline, layers must not keep state of the examples. Received: the "
                f"variable {name!r}, which changes in the forward pass. Take another layer, or "
                "train without `Pipeline`."
            )
        with tf.device(stage.device):
            variables[key].assign(units[0].changed[key])
