"""The tensors of a checkpoint: collects them from a training, and restores them.

A tensor that is in parts is never whole anywhere: each process takes and restores the slices
that its replicas have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import keras
import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist.errors import CheckpointError
from tfdist.resume.checkpoint import slices
from tfdist.resume.checkpoint.shards import Piece, Specs
from tfdist.resume.checkpoint.slices import Shape, Slice
from tfdist.step.state import Sharded, TrainState
from tfdist.strategies.base import Strategy
from tfdist.strategies.whole import as_whole, whole

Tensor = Any
_GLOBAL_SEED = "keras/global_seed_generator"


class Reader(Protocol):
    """Reads the tensors of a checkpoint; see `shards.TensorReader`."""

    @property
    def specs(self) -> Specs:
        """The shape and the type of each tensor, by name."""

    def whole(self, name: str) -> Any:
        """Returns a tensor as an array."""

    def part(self, name: str, slices: Sequence[Slice], shape: Sequence[int]) -> Any:
        """Returns a part of a tensor as an array, padded with zeros."""


def take(strategy: Strategy, state: TrainState) -> list[Piece]:
    """Takes what this process writes, without an exchange between processes.

    That is what its replicas alone have, and on the chief what all replicas have.

    Args:
        strategy: The strategy that computes a batch. `Whole` counts as one replica.
        state: The variables.
    """
    # This does not copy: a tensor shares memory with its variable until the next assignment,
    # which then allocates new memory.
    pieces, place = [], strategy.place
    if place.is_chief:
        pieces = [
            Piece(f"variables/{number}", tf.convert_to_tensor(variable))
            for number, variable in enumerate(state.named)
            if state.role_in_parts(variable) is None
        ]
        if _keras.has_global_seed():
            seed = tf.identity(_keras.global_seed_variable().value)
            pieces.append(Piece(_GLOBAL_SEED, seed))
    for name, variable, role in _divided(state):
        for local, value in enumerate(strategy.local_tensors(variable)):
            replica = place.first_replica + local
            if role is not None and role.is_copy(replica):
                continue
            pieces += _pieces(name, value, _slices(variable, role, replica, place.num_replicas))
    return pieces


def of_others(strategy: Strategy, state: TrainState) -> Iterator[list[Piece]]:
    """Sends the chief what replicas of other processes have, one part of a variable at a time.

    All processes call this.

    Args:
        strategy: The strategy that computes a batch.
        state: The variables.

    Yields:
        A part's pieces on the chief. Nothing on other processes.
    """
    place = strategy.place
    for name, variable, role in _divided(state):
        own = strategy.local_tensors(variable)
        # Before the chief's come none: its replicas are the first ones.
        for replica in range(place.local_replicas, place.num_replicas):
            if role is not None and role.is_copy(replica):
                break
            local = replica - place.first_replica
            is_here = not place.is_chief and 0 <= local < place.local_replicas
            value = own[local] if is_here else tf.zeros_like(own[0])
            value = whole(strategy).sums(value)
            if place.is_chief:
                slices = _slices(variable, role, replica, place.num_replicas)
                yield _pieces(name, value, slices)


def put_back(
    strategy: Strategy,
    state: TrainState,
    reader: Reader | None,
    has_global_seed: bool,
    is_shared: bool = False,
) -> None:
    """Restores the tensors of `take`, on every worker.

    If the number of replicas has changed, the saved values of a per-replica variable are
    summed, and each replica gets an equal part of the sum: only the sum matters. A sharded
    variable's tensor is cut for the replicas that there are now.

    Args:
        strategy: The strategy that computes a batch. `Whole` counts as one replica.
        state: The variables.
        reader: Reads the checkpoint. None on processes that cannot.
        has_global_seed: Whether the checkpoint has Keras's global seed.
        is_shared: Whether all processes can read the checkpoint.
    """
    place, variables = strategy.place, list(state.replicated)
    if has_global_seed:
        variables.append(_keras.global_seed_variable())
    if reader is not None and (place.is_chief or not is_shared):
        for number, variable in enumerate(state.named):
            if state.role_in_parts(variable) is None:
                variable.assign(reader.whole(f"variables/{number}"))
        if has_global_seed:
            variables[-1].assign(reader.whole(_GLOBAL_SEED))
    _connecting(strategy).agree(variables)
    for name, variable, role in _divided(state):
        read = None if reader is None else _reading(reader, strategy, name, variable, role)
        if read is not None and (is_shared or place.num_workers == 1):
            first = place.first_replica
            values = [read(r) for r in range(first, first + place.local_replicas)]
        else:
            values = _distribute(strategy, variable, read)
        strategy.assign_copies(variable, values)


def check(
    state: TrainState,
    reader: Reader,
    saved: Mapping[str, Any],
) -> None:
    """Checks that a checkpoint has the tensors that `put_back` reads.

    Args:
        state: The variables.
        reader: Reads the checkpoint.
        saved: The checkpoint's state without tensors.

    Raises:
        CheckpointError: A tensor is missing, has another shape or type, or is not finite.
    """

    def refuse(requirement: str, received: str) -> NoReturn:
        raise CheckpointError(
            f"A checkpoint must have {requirement}. Received: {received} in "
            f"{saved['folder']}. Begin with an older checkpoint, or in another directory."
        )

    def shape_of(variable: Any, role: Sharded | None = None) -> Shape:
        shape = tuple(variable.shape)
        return shape if role is None else slices.whole_shape(role, shape)

    specs = reader.specs
    kinds: dict[str, list[tuple[Any, Shape]]] = {
        "variables": [(v, shape_of(v, state.role_in_parts(v))) for v in state.named],
        "per_replica": [(v, shape_of(v)) for v in state.per_replica],
        "sharded": [(v, shape_of(v, role)) for v, role in state.sharded],
    }
    for kind, variables in kinds.items():
        names = {name for name in specs if name.startswith(f"{kind}/")}
        if names != {f"{kind}/{number}" for number in range(len(variables))}:
            refuse(f"{len(variables)} tensors {kind}/*", f"{len(names)}")
        for number, (variable, expected) in enumerate(variables):
            name = f"{kind}/{number}"
            shape, dtype = specs[name]
            copies = shape[:1] if kind == "per_replica" else ()
            is_shape = shape == copies + expected and 0 not in copies
            if not is_shape or dtype != tf.as_dtype(variable.dtype).name:
                replicas = " for each replica" if kind == "per_replica" else ""
                refuse(
                    f"a tensor {name} of shape {expected} and {variable.dtype}{replicas}",
                    f"shape {shape} and {dtype}",
                )
            # What is not finite would be added to the gradients of all later steps.
            if kind == "per_replica" and not all(
                np.isfinite(_own_value(reader, name, expected, replica)).all()
                for replica in range(shape[0])
            ):
                refuse(f"finite numbers in {name}", "NaN or infinity")
    if saved["global_seed"] and _GLOBAL_SEED not in specs:
        refuse(f"a tensor {_GLOBAL_SEED}", "none")


def _divided(state: TrainState) -> Iterator[tuple[str, Any, Sharded | None]]:
    """Lists the variables that replicas have different values of, each with its name.

    The role is None if a tensor has the values of all replicas along a new axis 0.
    """
    for number, variable in enumerate(state.named):
        if (role := state.role_in_parts(variable)) is not None:
            yield f"variables/{number}", variable, role
    for number, variable in enumerate(state.per_replica):
        yield f"per_replica/{number}", variable, None
    for number, (variable, role) in enumerate(state.sharded):
        yield f"sharded/{number}", variable, role


def _slices(variable: Any, role: Sharded | None, replica: int, replicas: int) -> list[Slice]:
    """Returns the slices of a variable's tensor that a replica has."""
    shape = tuple(variable.shape)
    if role is None:
        return [_row(shape, replica, replicas)]
    return slices.slices_of_part(role, shape, replica)


def _row(shape: Shape, replica: int, replicas: int) -> Slice:
    """Returns the slice of a tensor that has the values of all replicas along axis 0."""
    return Slice((replicas, *shape), (replica, *(0 for _ in shape)), (1, *shape))


def _pieces(name: str, value: Tensor, of_part: Sequence[Slice]) -> list[Piece]:
    tensors = slices.cut(value, of_part)
    return [Piece(name, tensor, one) for tensor, one in zip(tensors, of_part, strict=True)]


def _reading(
    reader: Reader, strategy: Strategy, name: str, variable: Any, role: Sharded | None
) -> Callable[[int], Any]:
    """Returns a function that reads a replica's value of a variable."""
    shape, replicas = tuple(variable.shape), strategy.place.num_replicas
    if role is not None:
        return lambda replica: reader.part(
            name, _slices(variable, role, replica, replicas), shape
        )
    saved = reader.specs[name][0][0]
    if saved == replicas:
        return lambda replica: _own_value(reader, name, shape, replica)
    # A residual is the part of a replica's gradient that is still to be sent. The replicas send
    # residuals as a sum, so any division of it continues the training.
    total = _own_value(reader, name, shape, 0)
    for replica in range(1, saved):
        total = total + _own_value(reader, name, shape, replica)
    mean = (total / replicas).astype(total.dtype)
    return lambda replica: mean


def _own_value(reader: Reader, name: str, shape: Shape, replica: int) -> Any:
    """Reads the saved value of a per-replica variable."""
    replicas = reader.specs[name][0][0]
    return reader.part(name, [_row(shape, replica, replicas)], shape)


def _connecting(strategy: Strategy) -> Strategy:
    """Returns the strategy that connects the processes."""
    whole_batches = as_whole(strategy)
    return strategy if whole_batches is None else whole_batches.connected


def _distribute(
    strategy: Strategy, variable: Any, read: Callable[[int], Any] | None
) -> list[Any]:
    """Returns the values for this process's replicas; the chief reads all, one at a time."""
    place = strategy.place
    values: list[Any] = []
    # `agree` sends variables only.
    buffer = keras.Variable(np.zeros(variable.shape), dtype=variable.dtype, trainable=False)
    for replica in range(place.num_replicas):
        if read is not None:
            buffer.assign(read(replica))
        strategy.agree([buffer])
        if 0 <= replica - place.first_replica < place.local_replicas:
            values.append(np.array(keras.ops.convert_to_numpy(buffer)))
    return values


def size_of(state: TrainState, replicas: int) -> int:
    """Computes the number of bytes that the tensors of `take` need on disk.

    Args:
        state: The variables.
        replicas: Each has its own values of the per-replica ones, and a part of the sharded.
    """

    def of(variables: Sequence[Any]) -> int:
        return sum(map(_keras.num_bytes, variables))

    parts = [variable for variable, _ in state.sharded]
    return of(state.named) + replicas * of([*state.per_replica, *parts])
