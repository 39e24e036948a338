"""Handles device settings in a worker's script, where TensorFlow runs already.

`tfdist run` connects a worker before its script begins. After that, TensorFlow accepts no
device settings. A setting that changes no result is skipped with a warning. Any other raises.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdist.cluster import launched_config
from tfdist.errors import StrategyError

# Remedies by the function's name.
_RAISING = {
    "set_logical_device_configuration": (
        "Start more workers with -n instead, or start the script with `python` and call "
        "tfdist.init() after that line."
    ),
    "set_visible_devices": (
        "Set CUDA_VISIBLE_DEVICES for `tfdist run`, which distributes these GPUs to its "
        "workers (-1 for none)."
    ),
}
# Environment variables of the same effect, by the function's name.
_SKIPPED = {
    "set_memory_growth": "TF_FORCE_GPU_ALLOW_GROWTH",
    "set_intra_op_parallelism_threads": "TF_NUM_INTRAOP_THREADS",
    "set_inter_op_parallelism_threads": "TF_NUM_INTEROP_THREADS",
}


def explain(speaks: bool) -> None:
    """Makes TensorFlow's functions name the remedy if they are called too late.

    Args:
        speaks: Whether this process prints the warnings.
    """
    config, experimental = tf.config, tf.config.experimental
    for module, name in (
        (config, "set_logical_device_configuration"),
        (config, "set_visible_devices"),
        (experimental, "set_visible_devices"),
        (experimental, "set_memory_growth"),
        (config.threading, "set_intra_op_parallelism_threads"),
        (config.threading, "set_inter_op_parallelism_threads"),
    ):
        setattr(module, name, _explained(getattr(module, name), name, speaks))
    experimental.set_virtual_device_configuration = config.set_logical_device_configuration
    _restore_tf_config_for_strategies()


def _explained(function: Callable[..., Any], name: str, speaks: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def setting(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except RuntimeError:
            rule = "A worker's devices must be set before TensorFlow starts in it. "
            received = f"Received: tf.config's {name} after `tfdist run` had connected it. "
            if name in _RAISING:
                raise StrategyError(rule + received + _RAISING[name]) from None
            variable = _SKIPPED[name]
            value = str([*args, *kwargs.values()][-1]).lower()
            if speaks and os.environ.get(variable, "").lower() != value:
                _warn_once(f"{rule}{received}Set {variable}={value} for `tfdist run`.")

    return setting


@functools.cache
def _warn_once(text: str) -> None:
    print(f"tfdist: warning: {text}", file=sys.stderr, flush=True)


def _restore_tf_config_for_strategies() -> None:
    """Gives a strategy that the script makes the TF_CONFIG of the launcher."""
    strategy_class = tf.distribute.MultiWorkerMirroredStrategy
    original_init = strategy_class.__init__

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        launched_config.restore()
        original_init(self, *args, **kwargs)

    strategy_class.__init__ = init
