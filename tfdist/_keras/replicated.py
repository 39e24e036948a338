"""Applies the replacements in Keras while several replicas train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
from keras.src.backend.common.variables import Variable as _AnyVariable
from keras.src.backend.tensorflow import random as _random
from keras.src.backend.tensorflow.core import Variable as _Variable

from tfdist._keras import losses, metrics, optimizers
from tfdist._keras import random as draws
from tfdist._keras.batch_norm import moments
from tfdist._keras.interception import Replacement, replaced
from tfdist._keras.layer_losses import losses_by_replica
from tfdist._keras.variables import as_python, direct_assign, read_value

_DRAWS = (
    "dropout",
    "draw_seed",
    "normal",
    "uniform",
    "randint",
    "truncated_normal",
    "categorical",
    "gamma",
    "beta",
    "binomial",
)
_depth = 0  # of nested contexts, such as an evaluation in a callback


@contextlib.contextmanager
def replicated(has_servers: bool = False) -> Iterator[None]:
    """Applies the replacements that the package lists, while a model is trained.

    A replacement looks up the calling thread's `on_replica` batch. Without one, it does what
    Keras does.

    Args:
        has_servers: Whether `served` replaces the optimizer's update.
    """
    global _depth
    _depth += 1
    with contextlib.ExitStack() as stack:
        stack.callback(_leave)
        # Only the outermost context replaces anything. An inner one would take the replacements
        # for Keras's own methods, and wrap them again.
        if _depth == 1:
            for owner, name, value in replacements(has_servers):
                stack.enter_context(replaced(owner, name, value))
            stack.enter_context(losses_by_replica())
        yield


def _leave() -> None:
    global _depth
    _depth -= 1


def alone() -> contextlib.AbstractContextManager[None]:
    """Makes dropout in a single process the same as on a replica, also if XLA compiles it."""
    return replaced(_random, "dropout", draws.dropout)


def replacements(has_servers: bool = False) -> list[Replacement]:
    """Lists the replacements; see the package.

    Args:
        has_servers: As in `replicated`.
    """
    return [
        (keras.layers.BatchNormalization, "_moments", moments),
        (_Variable, "_direct_assign", direct_assign),
        (_AnyVariable, "value", property(read_value)),
        (_AnyVariable, "__int__", as_python(int)),
        (_AnyVariable, "__float__", as_python(float)),
        (keras.random.SeedGenerator, "next", draws.next_seed),
        *((_random, name, getattr(draws, name)) for name in _DRAWS),
        *losses.replacements(),
        *optimizers.replacements(has_servers),
        *metrics.replacements(),
    ]
