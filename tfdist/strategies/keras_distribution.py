"""What scripts ask of `keras.distribution`. On TensorFlow, Keras itself ignores it.

Keras's `DataParallel` is what tfdist does anyway. `ModelParallel` is refused: Keras would train
on one device, without a word.
"""

from __future__ import annotations

import math
from typing import Any

import keras

from tfdist.errors import StrategyError

_KINDS = (keras.distribution.DataParallel, keras.distribution.ModelParallel)


def without_distribution(strategy: Any) -> Any:
    """Returns "auto" for a distribution of Keras's, and any other value as it is.

    Args:
        strategy: As in `tfdist.fit`, or a `keras.distribution.DataParallel`.

    Raises:
        StrategyError: It is a `ModelParallel`, or `set_distribution` was called with one.
    """
    for distribution in (strategy, keras.distribution.distribution()):
        if isinstance(distribution, keras.distribution.ModelParallel):
            raise StrategyError(
                "Each device must hold all weights: TensorFlow has no model parallelism in "
                "Keras, which would train on one device. Received: "
                f"keras.distribution.ModelParallel with the mesh {_mesh(distribution)}. For "
                "data parallelism, call keras.distribution.set_distribution(None); to save "
                "memory, call tfdist.recompute(model)."
            )
    return "auto" if isinstance(strategy, _KINDS) else strategy


def check_devices(strategy: Any, replicas: int) -> None:
    """Refuses a distribution of other devices than those that train.

    Args:
        strategy: As in `tfdist.fit`, or a `keras.distribution.DataParallel`.
        replicas: Number of replicas of the strategy that was chosen for it.

    Raises:
        StrategyError: It is one.
    """
    # A script may also have chosen a distribution by `set_distribution`.
    if isinstance(strategy, str) and strategy == "auto":
        strategy = keras.distribution.distribution()
    if not isinstance(strategy, _KINDS) or math.prod(strategy.device_mesh.shape) == replicas:
        return
    raise StrategyError(
        "keras.distribution.DataParallel must have the devices that tfdist trains on. "
        f"Received: the mesh {_mesh(strategy)}, but {replicas} replica(s). Name the strategy "
        'instead: strategy="mirrored" for several devices of a process, or start processes '
        "with `tfdist run -n 2`."
    )


def _mesh(distribution: Any) -> str:
    mesh = distribution.device_mesh
    return str(dict(zip(mesh.axis_names, mesh.shape, strict=True)))
