"""Whether all processes come to an exchange that some of them may miss."""

from __future__ import annotations

import time
import uuid

import tensorflow as tf

from tfdist.errors import PeerError
from tfdist.strategies.base import Strategy

# Processes leave at about the same time where a callback raises on each of them.
_WITHIN_S = 5.0
_POLL_S = 0.02


def all_ended(strategy: Strategy, token: str, error: BaseException) -> bool:
    """Returns whether all processes have left a training, and will take part in a gather.

    A process that is still in a step, or that is lost, does not answer. Then none gathers.

    Args:
        strategy: The strategy that connects the processes.
        token: A text that all processes have for this training alone.
        error: Why this process leaves.
    """
    # A collective that fails has lost a process. One that exits needs no state.
    if isinstance(error, tf.errors.OpError | PeerError | SystemExit):
        return strategy.place.num_workers == 1
    return all_here(strategy, f"ended-{token}", _WITHIN_S)


def all_here(strategy: Strategy, name: str, within_s: float) -> bool:
    """Returns whether all processes call this now, for the same thing.

    Args:
        strategy: The strategy that connects the processes.
        name: What they come for.
        within_s: Seconds to wait for the others.
    """
    place = strategy.place
    if place.num_workers == 1:
        return True
    store = strategy.key_value_store()
    if store is None:
        return False
    # First each says that it is here, then whom it has seen. So none goes on with one that has
    # given up: that one does not answer to the number of this call.
    store.post(f"{name}-here/{place.worker_index}", uuid.uuid4().hex)
    end, answer = time.monotonic() + within_s, ""
    while time.monotonic() < end:
        here = store.read_all(f"{name}-here")
        if len(here) == place.num_workers:
            seen = ",".join(here[worker] for worker in sorted(here))
            if seen != answer:
                answer = seen
                store.post(f"{name}-seen/{place.worker_index}", answer)
            answers = store.read_all(f"{name}-seen")
            if len(answers) == place.num_workers and set(answers.values()) == {answer}:
                return True
        time.sleep(_POLL_S)
    return False
