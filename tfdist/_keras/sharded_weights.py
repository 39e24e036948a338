"""Weights of which each replica has a part. They are gathered where they are read.

(Rajbhandari et al., "ZeRO", SC 2020, section 5.3; Zhao et al., "PyTorch FSDP", VLDB 2023.)

A weight in parts has an `InParts` in place of its `tf.Variable`. A layer that reads it gets
the whole value, which is gathered from all replicas. `GradientTape` takes the gradient of that
value (`sharded_tapes`), so the rest of the step is as if the weight were whole: sparse
gradients stay sparse, and the exchange gives each replica its part of the sum. Optimizers see
the parts (`showing_parts`).

A value that is read like this stays until the backward pass has used it. `regathering` frees it
in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tensorflow as tf
from tensorflow.python.eager import record as _record
from tensorflow.python.ops.control_flow_v2_func_graphs import (
    ControlFlowFuncGraph as _ControlFlowFuncGraph,
)

from tfdist._keras.replica import Tensor, current_batch
from tfdist._keras.variables import exchange_value, is_never_run, local_copies, refill
from tfdist.errors import StrategyError


class Gathering(Protocol):
    """Joins the parts of weights."""

    def replica_id(self) -> Tensor:
        """Returns the number of the running replica's parts."""

    def local_numbers(self) -> Sequence[int]:
        """Returns the numbers of the parts of this process."""

    def gather(self, cuts: Sequence[Any], parts: Sequence[Tensor]) -> list[Tensor]:
        """Gathers whole tensors from the parts of all replicas."""

    def scatter(self, cuts: Sequence[Any], wholes: Sequence[Tensor]) -> list[Tensor]:
        """Sums whole tensors over all replicas. The running one gets its part of each sum."""

    def takes_parts(self, variable: Any) -> bool:
        """Tells whether the optimizer of a weight takes this replica's part of its gradient."""

    def divides(self, variable: Any) -> bool:
        """Tells whether a team of replicas computes with the parts of a weight."""

    def own_gradient(self, variable: Any, whole: Tensor) -> Tensor:
        """Sums the gradient of a whole weight over a team, and returns the own part."""

    def read(self, variable: Any) -> Any:
        """Returns the whole value of a variable as an array, if this process can have it."""


class Backing:
    """What Keras asks of the `tf.Variable` behind a `keras.Variable`, but its value.

    Args:
        variable: The `keras.Variable`.
        whole: The `tf.Variable` that this stands for.
        shape: The shape of the whole value.
    """

    def __init__(self, variable: Any, whole: Any, shape: tf.TensorShape) -> None:
        self.shape = shape
        self.dtype = whole.dtype
        self.device = whole.device
        self.name = whole.name
        self.trainable = whole.trainable
        self._unique_id = whole._unique_id
        self.variable = variable


class InParts(Backing):
    """The backing of a `keras.Variable` of which each replica has a part.

    Keras reads it by `__tf_tensor__`, and writes it by its `assign` methods.

    Args:
        variable: The `keras.Variable`.
        whole: The `tf.Variable` that this stands for, which is empty.
        part: The `tf.Variable` of the parts, with a copy on each device of this process.
        cut: How it is cut.
        gathering: Joins the parts.
    """

    def __init__(
        self, variable: Any, whole: Any, part: Any, cut: Any, gathering: Gathering
    ) -> None:
        super().__init__(variable, whole, tf.TensorShape(cut.shape))
        self.whole = whole
        self.part = part
        self.cut = cut
        self.gathering = gathering

    @property
    def is_divided(self) -> bool:
        """Whether a team of replicas computes with the parts; see `parallel_layers`."""
        return self.gathering.divides(self.variable)

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        return tf.cast(self._read(), dtype or self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy().astype(dtype or self.dtype.as_numpy_dtype)

    @property
    def handle(self) -> Any:
        """The handle of the empty `tf.Variable`, which names this one in a trace."""
        return self.whole.handle

    def numpy(self) -> Any:
        """Returns the whole value, if this process can have it."""
        return self.gathering.read(self.variable)

    def read_value(self) -> Tensor:
        """Returns the whole value."""
        return tf.convert_to_tensor(self)

    def _serialize_to_tensors(self) -> dict[str, Tensor]:
        return {"VARIABLE_VALUE": tf.constant(self.numpy())}

    # --- reading --------------------------------------------------------------------------

    def _read(self) -> Tensor:
        if is_never_run():
            return tf.convert_to_tensor(self.whole)
        batch = current_batch()
        if batch is None:
            return self._read_outside()
        if batch.is_updating:
            return self._gathered()
        with batch.outermost(self._refuse_function):
            whole = batch.gathered.get(id(self))
            if whole is None:
                whole = self._gathered()
                batch.gathered[id(self)] = whole
                batch.reads.setdefault(id(self), []).append(whole)
            return whole

    def _gathered(self) -> Tensor:
        (whole,) = gathered([self])
        return whole

    def _read_outside(self) -> Tensor:
        """Returns the value outside of the replicas, such as in a callback."""
        parts = local_copies(self.part)
        if len(parts) == self.cut.parts:
            return self.cut.joined(tf.stack([tf.reshape(part, [-1]) for part in parts]))
        if tf.executing_eagerly():
            return tf.constant(self.numpy())
        raise StrategyError(
            "A process can read a weight only if it has all of it. Received: a function of "
            f"yours that reads {self.name!r}, which is in parts on several processes, outside "
            "of the steps of `fit`. Use tfdist.evaluate or tfdist.predict after `fit`."
        )

    def _refuse_function(self, graph: Any) -> None:
        # It may be kept, and used in another step with the value of this one.
        if not isinstance(graph, _ControlFlowFuncGraph):
            raise StrategyError(
                "A weight in parts must be read in the step itself. Received: "
                f"{self.name!r}, which is read inside of a tf.function of yours. Take the "
                "decorator off: the whole step is a tf.function. Or use tfdist.Zero(stage=1)."
            )

    # --- writing --------------------------------------------------------------------------

    def assign(self, value: Any) -> None:
        """Writes the parts of this process, or of the running replica.

        Args:
            value: A tensor of the whole shape.
        """
        self._write("assign", value)

    def assign_add(self, value: Any) -> None:
        """Adds to the parts; see `assign`."""
        self._write("assign_add", value)

    def assign_sub(self, value: Any) -> None:
        """Subtracts from the parts; see `assign`."""
        self._write("assign_sub", value)

    def _write(self, method: str, value: Any) -> None:
        value = tf.cast(value, self.dtype)
        if is_never_run():
            getattr(self.whole, method)(value)
            return
        batch = current_batch()
        if batch is not None:
            getattr(self.part, method)(self.cut.own(value, self.gathering.replica_id()))
            batch.gathered.pop(id(self), None)
            return
        numbers = self.gathering.local_numbers()
        for local, number in zip(local_copies(self.part), numbers, strict=True):
            getattr(local, method)(self.cut.own(value, number))


def gathered(weights: Sequence[InParts]) -> list[Tensor]:
    """Gathers the whole values of weights, together.

    Args:
        weights: In parts, at least one.
    """
    parts = [tf.convert_to_tensor(weight.part) for weight in weights]  # tapes watch these
    with _record.stop_recording():
        gathering = weights[0].gathering
        wholes = gathering.gather([weight.cut for weight in weights], parts)
    for whole, part in zip(wholes, parts, strict=True):
        # Gradients end at the whole value; see `sharded_tapes`.
        _record.record_operation("Gather", [whole], [part], lambda *upstream: [None])
    return wholes


def _add_operators() -> None:
    """Lets Python's operators work with the whole value, as with that of a `tf.Variable`."""

    def operator(name: str) -> Callable[..., Tensor]:
        return lambda self, *args: getattr(tf.convert_to_tensor(self), name)(*args)

    for name in tf.Tensor.OVERLOADABLE_OPERATORS:
        if name not in ("__eq__", "__ne__"):  # without them, it can be a key
            setattr(InParts, name, operator(name))


_add_operators()


class LostWeight(Backing):
    """The backing of a `keras.Variable` whose parts could not be joined. It can be assigned.

    Args:
        variable: The `keras.Variable`.
        whole: Its empty `tf.Variable`.
    """

    def __init__(self, variable: Any, whole: Any) -> None:
        super().__init__(variable, whole, whole.shape)
        self._whole = whole

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        raise StrategyError(
            f"A weight must have its value. Received: {self.name!r}, which was in parts on "
            "several processes when a training ended by an error. Load weights that you saved "
            "before, or resume from a checkpoint in a new process."
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy()

    def numpy(self) -> Any:
        """Raises an error."""
        return tf.convert_to_tensor(self)

    def assign(self, value: Any) -> None:
        """Gives the variable its plain `tf.Variable` back, with a value.

        Args:
            value: A tensor of its shape.
        """
        exchange_value(self.variable, self._whole, tuple(self.shape))
        refill(self._whole, [value])


def is_lost(variable: Any) -> bool:
    """Tells whether the parts of a weight could not be joined.

    Args:
        variable: A `keras.Variable`.
    """
    return isinstance(variable._value, LostWeight)


def weights_of_layers(model: Any) -> list[Any]:
    """Lists the weights that layers have made as trainable, also those that are frozen.

    Args:
        model: A built `keras.Model`.
    """
    layers = model._flatten_layers()
    weights = {id(v): v for layer in layers for v in layer._trainable_variables}
    return [v for v in weights.values() if not getattr(v, "overwrite_with_gradient", False)]


def in_parts(variable: Any) -> InParts | None:
    """Returns the backing of a variable of which each replica has a part, or None.

    Args:
        variable: A `keras.Variable`.
    """
    return variable._value if isinstance(variable._value, InParts) else None


def cut_in_parts(variable: Any) -> Any:
    """Returns the cut of a weight that is in parts, or None.

    Args:
        variable: A `keras.Variable`.
    """
    value = variable._value
    return value.cut if isinstance(value, InParts) else None


@contextlib.contextmanager
def showing_parts(variables: Sequence[Any]) -> Iterator[None]:
    """Makes a context in which weights in parts have the shape and the value of a part.

    Args:
        variables: `keras.Variable`s, in parts or not.
    """
    hidden = {id(v): (v, v._value) for v in variables if isinstance(v._value, InParts)}
    for variable, backing in hidden.values():
        _back(variable, backing.part, backing.cut.part_shape)
    try:
        yield
    finally:
        batch = current_batch()
        for variable, backing in hidden.values():
            _back(variable, backing, backing.cut.shape)
            if batch is not None:  # it may have been assigned
                batch.gathered.pop(id(backing), None)


def _back(variable: Any, value: Any, shape: tuple[int, ...]) -> None:
    variable._value, variable._shape, variable._ndim = value, tuple(shape), len(shape)


def register_parts_of_weights(optimizers: Sequence[Any]) -> None:
    """Lets optimizers find their state for a weight also by the key of its parts.

    Args:
        optimizers: `keras.Optimizer`s, with those that they wrap.
    """
    for optimizer in optimizers:
        if optimizer.built:
            for index, variable in enumerate(optimizer._trainable_variables):
                if isinstance(variable._value, InParts):
                    key = variable._value.part._unique_id
                    optimizer._trainable_variables_indices[key] = index
