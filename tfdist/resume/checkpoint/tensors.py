"""What of a training's state is tensors: how it is taken, and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import _keras
from tfdist.step.state import TrainState
from tfdist.strategies.base import Strategy
from tfdist.strategies.whole import Whole, whole

Tensor = Any
_GLOBAL_SEED = "keras/global_seed_generator"


def take(strategy: Strategy, state: TrainState) -> dict[str, Tensor]:
    """Gives the tensors of a training, by name.

    Replicated ones are this process's own, so nothing is exchanged for them. What each replica
    has for itself is gathered: then all workers must call this.

    Args:
        strategy: What computes a batch; `Whole` counts as one replica.
        state: The variables.

    Returns:
        Tensors; those of other workers' replicas on the chief alone.
    """
    # Read now; what is read shares memory with a variable until that is assigned to.
    tensors = {
        f"variables/{number}": tf.convert_to_tensor(variable)
        for number, variable in enumerate(state.replicated)
    }
    for number, variable in enumerate(state.per_replica):
        tensors[f"per_replica/{number}"] = _gathered(strategy, variable)
    if _keras.has_global_seed():
        tensors[_GLOBAL_SEED] = tf.identity(_keras.global_seed_variable().value)
    return tensors


def put_back(
    strategy: Strategy,
    state: TrainState,
    read: Callable[[str], Any] | None,
    has_global_seed: bool,
) -> None:
    """Puts back what `take` gave, on every worker.

    On another number of replicas each gets the mean of what all had for themselves, times
    their old number: only the sum matters.

    Args:
        strategy: What computes a batch; `Whole` counts as one replica.
        state: The variables.
        read: Gives a tensor by name; None on workers that have not read the checkpoint.
        has_global_seed: Whether it was among them.
    """
    variables = list(state.replicated)
    if has_global_seed:
        variables.append(_keras.global_seed_variable())
    if read is not None:
        for number, variable in enumerate(state.replicated):
            variable.assign(read(f"variables/{number}"))
        if has_global_seed:
            variables[-1].assign(read(_GLOBAL_SEED))
    _connecting(strategy).agree(variables)
    for number, variable in enumerate(state.per_replica):
        saved = None if read is None else read(f"per_replica/{number}")
        strategy.assign_copies(variable, _dealt_out(strategy, variable, saved))


def _connecting(strategy: Strategy) -> Strategy:
    return strategy.connected if isinstance(strategy, Whole) else strategy


def _gathered(strategy: Strategy, variable: Any) -> Tensor:
    """Gives the values of all replicas on the chief: shape [replicas, ...]."""
    place, own = strategy.place, strategy.copies(variable)
    values = []
    for replica in range(place.num_replicas):
        local = replica - place.first_replica
        is_here = 0 <= local < place.local_replicas
        value = own[local] if is_here else np.zeros_like(own[0])
        # One replica's at a time: all of them may be more than a worker's memory holds.
        if place.num_workers > 1:
            value = whole(strategy).sums(tf.constant(value)).numpy()
        values.append(value)
        if not place.is_chief:
            values.clear()
    return tf.constant(np.stack(values)) if place.is_chief else None


def _dealt_out(strategy: Strategy, variable: Any, saved: Any) -> list[Any]:
    """Gives the values of this process's replicas, of what the chief has read."""
    place = strategy.place
    if saved is not None and len(saved) != place.num_replicas:
        mean = saved.sum(0) / place.num_replicas
        saved = [mean.astype(saved.dtype)] * place.num_replicas
    values: list[Any] = []
    box = keras.Variable(np.zeros(variable.shape), dtype=variable.dtype, trainable=False)
    for replica in range(place.num_replicas):
        if saved is not None:
            box.assign(saved[replica])
        strategy.agree([box])
        if 0 <= replica - place.first_replica < place.local_replicas:
            values.append(np.array(keras.ops.convert_to_numpy(box)))
    return values


def size_of(variables: Sequence[Any]) -> int:
    """Gives the bytes that variables need on disk.

    Args:
        variables: `keras.Variable`s.
    """
    return sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables)
