"""Strategies that a script makes for itself, in a process that trains with tfdist's.

A connected process has one strategy: a second one would connect again, with the ports and the
names of the first, and TensorFlow ends such a process. So the script gets the one there is.
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
    """Lets the constructors of `tf.distribute` give a connected process's strategy.

    Args:
        strategy: What this process trains with.

    Returns:
        What puts TensorFlow's own back.
    """
    given = None if strategy.has_servers else getattr(strategy, "strategy", None)
    given = given or _StandIn(strategy)
    # Not by a context: one that nobody keeps is left when it is freed.
    with contextlib.ExitStack() as stack:
        for module in (tf.distribute, tf.distribute.experimental):
            for name in _NAMES:
                original = getattr(module, name, None)
                if isinstance(original, type):
                    stack.callback(setattr, module, name, original)
                    setattr(module, name, _claimed(original, given))
            if isinstance(given, _StandIn):
                name, coordinator = "ClusterCoordinator", module.coordinator
                stack.callback(setattr, coordinator, name, getattr(coordinator, name))
                setattr(coordinator, name, _refuse_coordinator)
        return stack.pop_all().close


def _claimed(original: type, given: Any) -> type:
    class Claiming(type(original)):  # type: ignore[misc]
        """Gives what there is when a class is called."""

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            launched_config.restore()  # a script sets it for this
            return given

        def __instancecheck__(cls, instance: Any) -> bool:
            return instance is given or isinstance(instance, original)

    name, text = original.__name__, original.__doc__
    return Claiming(name, (original,), {"__doc__": text, "__module__": original.__module__})


class _StandIn(tf.distribute.OneDeviceStrategy):  # type: ignore[misc]
    """What a script gets where processes are not connected by `tf.distribute`.

    Models made in its scope train with tfdist. Loops over it would train each process alone.

    Args:
        strategy: What this process trains with.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__("/CPU:0")
        self._strategy = strategy

    @property
    def num_replicas_in_sync(self) -> int:
        """All replicas, as a script multiplies its batch size by it."""
        return self._strategy.place.num_replicas


def _refusing(name: str) -> Any:
    def method(stand_in: _StandIn, *args: Any, **kwargs: Any) -> Any:
        raise StrategyError(
            f"A training loop of your own must run on a tf.distribute.Strategy. Received: "
            f"strategy.{name}(...) in a process that trains with {stand_in._strategy.name}. "
            "Train with model.fit, or start the script with `tfdist run -n 2 --strategy "
            "multi_worker`."
        )

    return method


for _name in _LOOPS:
    setattr(_StandIn, _name, _refusing(_name))


def _refuse_coordinator(*args: Any, **kwargs: Any) -> Any:
    raise StrategyError(
        "A ClusterCoordinator of your own must be the only one. Received: "
        "ClusterCoordinator(...) in a process whose servers tfdist coordinates. Train with "
        "model.fit, which hands steps to the workers, or start the processes without tfdist."
    )
