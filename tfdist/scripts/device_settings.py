"""Settings of devices that a script makes in a worker, where TensorFlow runs already.

`tfdist run` connects a worker before its script begins, and TensorFlow takes no settings of
devices afterwards. What changes no result is left out with a sentence, the rest is refused.
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

_MORE = "Start more workers with -n in place of it, or start the script with `python` and call "
_MORE += "tfdist.init() after that line."
_REFUSED = {
    "set_logical_device_configuration": _MORE,
    "set_visible_devices": (
        "Set CUDA_VISIBLE_DEVICES for `tfdist run`, which shares these GPUs out (-1 for none)."
    ),
}
_GROWTH = "TF_FORCE_GPU_ALLOW_GROWTH"
_LEFT_OUT = {
    "set_memory_growth": _GROWTH,
    "set_intra_op_parallelism_threads": "TF_NUM_INTRAOP_THREADS",
    "set_inter_op_parallelism_threads": "TF_NUM_INTEROP_THREADS",
}


def explain(speaks: bool) -> None:
    """Makes TensorFlow's functions say what to do where they come too late.

    Args:
        speaks: Whether this process is the one that says what it leaves out.
    """
    config, older = tf.config, tf.config.experimental
    for place, name in (
        (config, "set_logical_device_configuration"),
        (config, "set_visible_devices"),
        (older, "set_visible_devices"),
        (older, "set_memory_growth"),
        (config.threading, "set_intra_op_parallelism_threads"),
        (config.threading, "set_inter_op_parallelism_threads"),
    ):
        setattr(place, name, _explained(getattr(place, name), name, speaks))
    older.set_virtual_device_configuration = config.set_logical_device_configuration
    _keep_tf_config()


def _explained(function: Callable[..., Any], name: str, speaks: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def setting(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except RuntimeError:
            rule = "A worker's devices must be set before TensorFlow starts in it. "
            received = f"Received: tf.config's {name} after `tfdist run` had connected it. "
            if name in _REFUSED:
                raise StrategyError(rule + received + _REFUSED[name]) from None
            variable = _LEFT_OUT[name]
            wanted = str([*args, *kwargs.values()][-1]).lower()
            if speaks and os.environ.get(variable, "").lower() != wanted:
                _say_once(f"{rule}{received}Set {variable}={wanted} for `tfdist run`.")

    return setting


@functools.cache
def _say_once(text: str) -> None:
    print(f"tfdist: warning: {text}", file=sys.stderr, flush=True)


def _keep_tf_config() -> None:
    """Lets a strategy that the script makes read the TF_CONFIG with which it was connected."""
    made = tf.distribute.MultiWorkerMirroredStrategy
    make = made.__init__

    @functools.wraps(make)
    def connected(self: Any, *args: Any, **kwargs: Any) -> None:
        launched_config.restore()
        make(self, *args, **kwargs)

    made.__init__ = connected
