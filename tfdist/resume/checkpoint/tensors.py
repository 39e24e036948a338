"""The tensors of a checkpoint: collects them from a training, and restores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist.errors import CheckpointError
from tfdist.step.state import Sharded, TrainState
from tfdist.strategies.base import Strategy
from tfdist.strategies.whole import as_whole, whole

Tensor = Any
_GLOBAL_SEED = "keras/global_seed_generator"


def take(strategy: Strategy, state: TrainState) -> dict[str, Tensor]:
    """Collects the tensors of a training, by name.

    Replicated variables need no exchange between workers. Per-replica and sharded variables
    are gathered: if there are any, all workers must call this.

    Args:
        strategy: The strategy that computes a batch. `Whole` counts as one replica.
        state: The variables.

    Returns:
        The tensors. Only the chief has those of other workers' replicas.
    """
    # This does not copy: a tensor shares memory with its variable until the next assignment,
    # which then allocates new memory.
    tensors = {
        f"variables/{number}": _take_whole(strategy, variable, state.role_in_parts(variable))
        for number, variable in enumerate(state.named)
    }
    for number, variable in enumerate(state.per_replica):
        values = _gather(strategy, variable)
        tensors[f"per_replica/{number}"] = tf.constant(np.stack(values)) if values else None
    for number, (variable, role) in enumerate(state.sharded):
        tensors[f"sharded/{number}"] = _take_whole(strategy, variable, role)
    if _keras.has_global_seed():
        tensors[_GLOBAL_SEED] = tf.identity(_keras.global_seed_variable().value)
    return tensors


def put_back(
    strategy: Strategy,
    state: TrainState,
    read: Callable[[str], Any] | None,
    has_global_seed: bool,
) -> None:
    """Restores the tensors of `take`, on every worker.

    If the number of replicas has changed, the saved values of a per-replica variable are
    summed, and each replica gets an equal part of the sum: only the sum matters. A sharded
    variable's tensor is cut for the replicas that there are now.

    Args:
        strategy: The strategy that computes a batch. `Whole` counts as one replica.
        state: The variables.
        read: Returns a tensor by its name. None on workers that have not read the checkpoint.
        has_global_seed: Whether the checkpoint has Keras's global seed.
    """
    place, variables = strategy.place, list(state.replicated)
    if has_global_seed:
        variables.append(_keras.global_seed_variable())
    for number, variable in enumerate(state.named):
        saved = None if read is None else read(f"variables/{number}")
        if (role := state.role_in_parts(variable)) is not None:
            if saved is not None:
                saved = np.reshape(saved, (role.rows, *variable.shape[1:]))
            parts = None if saved is None else _cut(saved, strategy, variable)
            strategy.assign_copies(variable, _distribute(strategy, variable, parts))
        elif saved is not None:
            variable.assign(saved)
    if read is not None and has_global_seed:
        variables[-1].assign(read(_GLOBAL_SEED))
    _connecting(strategy).agree(variables)
    for number, variable in enumerate(state.per_replica):
        saved = None if read is None else read(f"per_replica/{number}")
        if saved is not None and len(saved) != place.num_replicas:
            # A residual is the part of a replica's gradient that is still to be sent. The
            # replicas send residuals as a sum, so any division of it continues the training.
            mean = saved.sum(0) / place.num_replicas
            saved = [mean.astype(saved.dtype)] * place.num_replicas
        strategy.assign_copies(variable, _distribute(strategy, variable, saved))
    for number, (variable, _) in enumerate(state.sharded):
        saved = None if read is None else _cut(read(f"sharded/{number}"), strategy, variable)
        strategy.assign_copies(variable, _distribute(strategy, variable, saved))


def check(
    state: TrainState,
    read: Callable[[str], Any],
    specs: Mapping[str, tuple[tuple[int, ...], str]],
    saved: Mapping[str, Any],
) -> None:
    """Checks that a checkpoint has the tensors that `put_back` reads.

    Args:
        state: The variables.
        read: Returns a tensor by its name.
        specs: The shape and the type of each tensor in the checkpoint.
        saved: The checkpoint's state without tensors.

    Raises:
        CheckpointError: A tensor is missing, has another shape or type, or is not finite.
    """

    def refuse(requirement: str, received: str) -> NoReturn:
        raise CheckpointError(
            f"A checkpoint must have {requirement}. Received: {received} in "
            f"{saved['folder']}. Begin with an older checkpoint, or in another directory."
        )

    def shape_of(variable: Any) -> tuple[int, ...]:
        return tuple(variable.shape)

    def whole_shape(variable: Any) -> tuple[int, ...]:
        role = state.role_in_parts(variable)
        return shape_of(variable) if role is None or role.shape is None else role.shape

    kinds: dict[str, list[tuple[Any, tuple[int, ...]]]] = {
        "variables": [(v, whole_shape(v)) for v in state.named],
        "per_replica": [(v, shape_of(v)) for v in state.per_replica],
        "sharded": [(v, (role.rows, *shape_of(v)[1:])) for v, role in state.sharded],
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
            if kind == "per_replica" and not np.isfinite(read(name)).all():
                refuse(f"finite numbers in {name}", "NaN or infinity")
    if saved["global_seed"] and _GLOBAL_SEED not in specs:
        refuse(f"a tensor {_GLOBAL_SEED}", "none")


def _take_whole(strategy: Strategy, variable: Any, role: Sharded | None) -> Tensor:
    """Returns the value of a variable. One in parts is gathered; then only the chief has it."""
    if role is None:
        return tf.convert_to_tensor(variable)
    parts = _gather(strategy, variable)
    if not parts:
        return None
    whole_tensor = np.concatenate(parts)[: role.rows]
    return tf.constant(whole_tensor if role.shape is None else whole_tensor.reshape(role.shape))


def _connecting(strategy: Strategy) -> Strategy:
    """Returns the strategy that connects the processes."""
    whole_batches = as_whole(strategy)
    return strategy if whole_batches is None else whole_batches.connected


def _cut(tensor: Any, strategy: Strategy, variable: Any) -> list[Any]:
    """Returns the replicas' parts of a tensor, the last ones padded with zeros."""
    rows, replicas = int(variable.shape[0]), strategy.place.num_replicas
    padding = [(0, rows * replicas - len(tensor))] + [(0, 0)] * (np.ndim(tensor) - 1)
    return np.split(np.pad(tensor, padding), replicas)


def _gather(strategy: Strategy, variable: Any) -> list[Any]:
    """Returns the values of all replicas on the chief, nothing on other workers."""
    place, copies = strategy.place, strategy.copies(variable)
    values = []
    for replica in range(place.num_replicas):
        local = replica - place.first_replica
        is_here = 0 <= local < place.local_replicas
        value = copies[local] if is_here else np.zeros_like(copies[0])
        # One replica at a time: all of them may not fit into a worker's memory.
        if place.num_workers > 1:
            value = whole(strategy).sums(tf.constant(value)).numpy()
        values.append(value)
        if not place.is_chief:
            values.clear()
    return values


def _distribute(strategy: Strategy, variable: Any, saved: Any) -> list[Any]:
    """Returns the values for this process's replicas; the chief gives all of them."""
    place = strategy.place
    values: list[Any] = []
    # `agree` sends variables only.
    buffer = keras.Variable(np.zeros(variable.shape), dtype=variable.dtype, trainable=False)
    for replica in range(place.num_replicas):
        if saved is not None:
            buffer.assign(saved[replica])
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
