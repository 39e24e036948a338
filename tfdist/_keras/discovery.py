"""Finds the variables and optimizers of a step, by a trace before training.

A custom `train_step` may create optimizers and layers when it first runs, and store them
anywhere. A trace finds them without computing anything. A model that runs eagerly runs one
step on a sample instead, and then its state is restored.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context as _context
from tensorflow.python.framework import auto_control_deps_utils as _dependencies
from tensorflow.python.framework import func_graph as _func_graph

from tfdist._keras.noise import generator
from tfdist._keras.optimizers import with_nested
from tfdist._keras.replica import ReplicaBatch, Tensor, on_replica
from tfdist._keras.replicated import replicated

RANDOM_OPS = frozenset(
    {
        "AllCandidateSampler",
        "FixedUnigramCandidateSampler",
        "LearnedUnigramCandidateSampler",  # it also counts the classes that it has seen
        "LogUniformCandidateSampler",
        "Multinomial",
        "ParameterizedTruncatedNormal",
        "RandomGamma",
        "RandomPoissonV2",
        "RandomShuffle",
        "RandomStandardNormal",
        "RandomUniform",
        "RandomUniformInt",
        "SampleDistortedBoundingBox",
        "SampleDistortedBoundingBoxV2",
        "ThreadUnsafeUnigramCandidateSampler",
        "TruncatedNormal",
        "UniformCandidateSampler",
    }
)


@dataclass
class StepTrace:
    """The optimizers, metrics and variables that a traced step uses.

    Attributes:
        optimizers: The optimizers that it applies.
        metrics: Variables of the metrics that it updates.
        assigned: `keras.Variable`s that it assigns, without those of optimizers and metrics.
        updated: `keras.Variable`s that optimizers assign, such as those of their seeds.
        raw: Names of `tf.Variable`s that it assigns and that back no `keras.Variable`.
        updates_in_branch: Whether an optimizer is applied in a branch, loop or function of
            the graph.
        is_random: Whether it draws random numbers without an explicit seed.
        by_rows: `keras.Variable`s whose gradients are `tf.IndexedSlices`.
    """

    optimizers: list[Any] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    assigned: list[Any] = field(default_factory=list)
    updated: list[Any] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    updates_in_branch: bool = False
    is_random: bool = False
    by_rows: list[Any] = field(default_factory=list)

    @property
    def assigns_weights(self) -> bool:
        """Whether it assigns trainable weights without an optimizer."""
        return any(variable.trainable for variable in self.assigned)

    @property
    def variables(self) -> list[Any]:
        """All `keras.Variable`s that the trace has found, some of them twice."""
        of_optimizers = [v for o in with_nested(self.optimizers) for v in o.variables]
        return [*self.assigned, *self.metrics, *self.updated, *of_optimizers]


class _Recorder:
    """Takes the place of a step's reduction, and records its calls."""

    def __init__(self) -> None:
        self.step = StepTrace()
        self.gradients: list[tuple[Any, Tensor]] = []
        self.before: list[tuple[Any, Tensor]] = []
        self._graph = tf.compat.v1.get_default_graph()

    def scale(self, optimizer: Any, loss: Tensor) -> Tensor:
        """Returns the loss as it is."""
        return loss

    def apply(
        self,
        optimizer: Any,
        grads: list[Tensor],
        update: Callable[[list[Tensor]], None],
        variables: Sequence[Any],
    ) -> None:
        """Records the optimizer, and builds it as its own `apply` would, without an update."""
        if not any(recorded is optimizer for recorded in self.step.optimizers):
            self.step.optimizers.append(optimizer)
        if not tf.executing_eagerly():
            self.step.updates_in_branch |= tf.compat.v1.get_default_graph() is not self._graph
        if not optimizer.built:
            optimizer.build(list(variables))
        self.gradients += zip(variables, grads, strict=True)
        self.step.by_rows += [
            variable
            for variable, gradient in zip(variables, grads, strict=True)
            if isinstance(gradient, tf.IndexedSlices)
        ]
        # A traced update changes nothing, and shows which variables it assigns. An eager one
        # would change the weights.
        if not tf.executing_eagerly():
            update(grads)

    def begin(self, variables: Sequence[Any]) -> None:
        """Records a metric's variables."""
        recorded = {id(v) for v in self.step.metrics}
        new = [v for v in variables if id(v) not in recorded]
        self.step.metrics += new
        if tf.executing_eagerly():
            self.before += [(v, tf.identity(v.value)) for v in new]
            for variable in new:  # as at the beginning of an epoch
                variable.assign(tf.zeros_like(variable.value))


def trace(step: Callable[[Any], Any], spec: Any) -> StepTrace:
    """Traces a step, and creates its variables, without computing anything.

    Args:
        step: A function of a batch, such as `model.train_step`.
        spec: Describes a batch. Its leaves are `tf.TypeSpec`s.

    Raises:
        Exception: Any error of the step, as in Keras's own first step.
    """
    steps: list[StepTrace] = []

    def traced(data: Any) -> None:
        with recording(_only_replica(data)) as recorder:
            step(data)
        steps.append(recorder.step)

    # Not with tf.function, which creates variables of a special class.
    with keeping_random_state(), replicated():
        graph = _func_graph.func_graph_from_py_func("discovery", traced, (spec,), {})
    result = steps[-1]
    result.is_random = bool(random_ops(graph))
    result.raw = _raw_writes(graph, result)
    return result


def random_ops(graph: Any) -> list[str]:
    """Names the ops of a graph that draw random numbers without an explicit seed.

    Args:
        graph: A `tf.Graph`.
    """
    definition = graph.as_graph_def(add_shapes=False)
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    return sorted(RANDOM_OPS & {node.op for node in nodes})


def _raw_writes(graph: Any, step: StepTrace) -> list[str]:
    """Names the `tf.Variable`s that a trace assigns and that back no `keras.Variable`."""
    variables = [*step.variables, *(v for o in step.optimizers for v in o._trainable_variables)]
    # One without a value yet is traced with the `tf.Variable` that it will have.
    backing = {id(getattr(v._value, "whole", v._value)) for v in variables}
    written_ids: set[int] = set()
    for op in graph.get_operations():
        resources = [i for i, t in enumerate(op.inputs) if t.dtype == tf.resource]
        # TensorFlow knows of each op which of its resources it only reads.
        read_only = set(_dependencies._get_read_only_resource_input_indices_op(op))
        written_ids |= {id(op.inputs[i]) for i in resources if i not in read_only}
    # In the graph, a variable is the captured copy of its handle.
    handles = {id(outer): id(inner) for outer, inner in graph.captures}
    return [
        variable.name
        for variable in graph.variables
        if id(variable) not in backing and handles.get(id(variable.handle)) in written_ids
    ]


def run(step: Callable[[Any], Any], sample: Any) -> StepTrace:
    """Like `trace`, for a step that must run eagerly. It runs, then its state is restored.

    Args:
        step: A function of a batch.
        sample: A batch.
    """
    with keeping_random_state(), replicated(), recording(_only_replica(sample)) as recorder:
        step(sample)
    return recorder.step


def _only_replica(data: Any) -> ReplicaBatch:
    """Makes the `ReplicaBatch` of a single replica."""
    rows = tf.cast(rows_of(data), tf.int64)
    return ReplicaBatch(rows, rows, tf.zeros([], tf.int64), list, tf.identity)


@contextlib.contextmanager
def recording(batch: ReplicaBatch) -> Iterator[_Recorder]:
    """Records the step that runs in this context. At its end, eager changes are reverted.

    Args:
        batch: The batch of the step's replica.

    Yields:
        The recorder.
    """
    recorder = _Recorder()
    batch.updates = batch.metrics = recorder
    with on_replica(batch):
        try:
            yield recorder
        finally:
            touched = list(batch.touched.values())
            if tf.executing_eagerly():
                # Within `updating`, these assignments are not recorded as those of the step.
                with batch.updating():
                    for variable, value in [*touched, *recorder.before]:
                        variable.assign(value)
    recorder.step.updated = list(batch.updated.values())
    metrics = {id(v) for v in recorder.step.metrics}
    recorder.step.assigned = [v for v, _ in touched if id(v) not in metrics]


def rows_of(data: Any) -> Tensor:
    """Counts the rows of a batch.

    Args:
        data: Tensors, `tf.RaggedTensor`s or `tf.SparseTensor`s, nested.
    """
    first = tf.nest.flatten(data)[0]
    if isinstance(first, tf.RaggedTensor):
        return first.nrows()
    return tf.shape(first)[0]


@contextlib.contextmanager
def keeping_random_state() -> Iterator[None]:
    """Restores the states of Python's, NumPy's and TensorFlow's generators at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    tensorflow_generator = generator()
    tensorflow_state = None if tensorflow_generator is None else tensorflow_generator.getstate()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if (
            tensorflow_generator is not None
            and tensorflow_generator.getstate() != tensorflow_state
        ):
            tensorflow_generator.setstate(tensorflow_state)
            # Cached kernels have a random state too, each for its seed.
            _context.context().clear_kernel_cache()
