"""Strategies that a script creates itself, in a process that trains with tfdist.

A connected process can have only one strategy. A second one would connect again, with the ports
and names of the first, and TensorFlow would end the process. So the script gets the strategy
that exists already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist.cluster import launched_config
from tfdist.errors import StrategyError
from tfdist.strategies.base import Strategy

_NAMES = ("MirroredStrategy", "MultiWorkerMirroredStrategy", "ParameterServerStrategy")
_LOOPS = (
    "run",
    "reduce",
    "gather",
    "experimental_distribute_dataset",
    "distribute_datasets_from_function",
    "experimental_distribute_values_from_function",
)


def claim(strategy: Strategy) -> Callable[[], None]:
    """Makes the constructors of `tf.distribute` return the strategy of a connected process.

    Args:
        strategy: The strategy of this process.

    Returns:
        A function that restores TensorFlow's constructors.
    """
    existing = None if strategy.has_servers else strategy.strategy
    existing = existing or _StandIn(strategy)
    # Returns a function, not a context: a context would end if the caller dropped it.
    with contextlib.ExitStack() as stack:
        for module in (tf.distribute, tf.distribute.experimental):
            for name in _NAMES:
                original = getattr(module, name, None)
                if isinstance(original, type):
                    stack.callback(setattr, module, name, original)
                    setattr(module, name, _claimed(original, existing))
            if isinstance(existing, _StandIn):
                name, coordinator = "ClusterCoordinator", module.coordinator
                stack.callback(setattr, coordinator, name, getattr(coordinator, name))
                setattr(coordinator, name, _refuse_coordinator)
        return stack.pop_all().close


def _claimed(original: type, existing: Any) -> type:
    class Claiming(type(original)):  # type: ignore[misc]
        """Returns the existing strategy when the class is called."""

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            launched_config.restore()  # the script may have changed it for this call
            return existing

        def __instancecheck__(cls, instance: Any) -> bool:
            return instance is existing or isinstance(instance, original)

    name, text = original.__name__, original.__doc__
    return Claiming(name, (original,), {"__doc__": text, "__module__": original.__module__})


class _StandIn(tf.distribute.OneDeviceStrategy):  # type: ignore[misc]
    """The strategy that a script gets if `tf.distribute` does not connect the processes.

    Models made in its scope train with tfdist. A custom training loop with it would train each
    process alone, so its methods for such loops raise.

    Args:
        strategy: The strategy of this process.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__("/CPU:0")
        self._strategy = strategy

    @property
    def num_replicas_in_sync(self) -> int:
        """The number of all replicas. Scripts scale their batch size by it."""
        return self._strategy.place.num_shares


def _raising(name: str) -> Any:
    def method(stand_in: _StandIn, *args: Any, **kwargs: Any) -> Any:
        raise StrategyError(
            f"A training loop of your own must run on a tf.distribute.Strategy. Received: "
            f"strategy.{name}(...) in a process that trains with {stand_in._strategy.name}. "
            "Train with model.fit, or start the script with `tfdist run -n 2 --strategy "
            "multi_worker`."
        )

    return method


for _name in _LOOPS:
    setattr(_StandIn, _name, _raising(_name))


def _refuse_coordinator(*args: Any, **kwargs: Any) -> Any:
    raise StrategyError(
        "A ClusterCoordinator of your own must be the only one. Received: "
        "ClusterCoordinator(...) in a process whose servers tfdist coordinates. Train with "
        "model.fit, which sends steps to the workers, or start the processes without tfdist."
    )
