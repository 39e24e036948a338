"""What scripts ask of `keras.distribution`. On TensorFlow, Keras itself ignores it.

Keras's `DataParallel` is what tfdist does anyway. For `ModelParallel` it has its own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import keras

from tfdist.errors import StrategyError
from tfdist.strategies.model_parallel import ModelParallel, of_keras

_KINDS = (keras.distribution.DataParallel, keras.distribution.ModelParallel)


def without_distribution(strategy: Any) -> Any:
    """Returns what tfdist has in place of a distribution of Keras's; other values as they are.

    Args:
        strategy: As in `tfdist.fit`. A name trains by the `ModelParallel` that
            `set_distribution` was called with, if it was.
    """
    if isinstance(strategy, keras.distribution.ModelParallel):
        return of_keras(strategy)
    if isinstance(strategy, keras.distribution.DataParallel):
        return "auto"
    is_set = isinstance(keras.distribution.distribution(), keras.distribution.ModelParallel)
    if isinstance(strategy, str) and is_set:
        return replace(of_keras(keras.distribution.distribution()), on=strategy)
    return strategy


def check_devices(strategy: Any, replicas: int) -> None:
    """Refuses a distribution or a mesh of other devices than those that train.

    Args:
        strategy: As in `tfdist.fit`.
        replicas: Number of replicas of the strategy that was chosen for it.

    Raises:
        StrategyError: It is one.
    """
    if isinstance(strategy, str):
        distribution = keras.distribution.distribution()
        # Other strategies with a name are not asked for the devices of data parallelism.
        is_asked = strategy == "auto" or not isinstance(
            distribution, keras.distribution.DataParallel
        )
        strategy = distribution if is_asked else strategy
    if isinstance(strategy, _KINDS):
        devices, mesh = math.prod(strategy.device_mesh.shape), _mesh(strategy)
    elif isinstance(strategy, ModelParallel) and strategy.devices is not None:
        devices, mesh = strategy.devices, str(strategy.axes)
    else:
        return
    if devices != replicas:
        raise StrategyError(
            "A mesh must have the devices that tfdist trains on. "
            f"Received: the mesh {mesh}, but {replicas} replica(s). Name the strategy "
            'instead: strategy="mirrored" for several devices of a process, or start processes '
            "with `tfdist run -n 2`."
        )


def _mesh(distribution: Any) -> str:
    mesh = distribution.device_mesh
    return str(dict(zip(mesh.axis_names, mesh.shape, strict=True)))
