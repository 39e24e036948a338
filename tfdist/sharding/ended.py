"""Whether all processes have left a training by an error, so that they can gather its state."""

from __future__ import annotations

import time

import tensorflow as tf

from tfdist.errors import PeerError
from tfdist.strategies.base import Strategy

# Processes leave at about the same time where a callback raises on each of them.
_WITHIN_S = 5.0
_POLL_S = 0.05


def all_ended(strategy: Strategy, token: str, error: BaseException) -> bool:
    """Returns whether all processes have left a training, and will take part in a gather.

    A process that is still in a step, or that is lost, does not answer. Then none gathers.

    Args:
        strategy: The strategy that connects the processes.
        token: A text that all processes have for this training alone.
        error: Why this process leaves.
    """
    place = strategy.place
    if place.num_workers == 1:
        return True
    store = strategy.key_value_store()
    # A collective that fails has lost a process. One that exits needs no state.
    if store is None or isinstance(error, tf.errors.OpError | PeerError | SystemExit):
        return False
    # The second round: a process that has given up in the first one does not post again. So
    # none waits in a gather for one that does not come.
    for name in (f"ended-{token}", f"gathers-{token}"):
        end = time.monotonic() + _WITHIN_S
        store.post(f"{name}/{place.worker_index}", "1")
        while len(store.read_all(name)) < place.num_workers:
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_S)
    return True
