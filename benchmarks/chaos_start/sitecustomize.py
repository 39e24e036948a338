"""Cheaper starts of processes, as in the tests; Python runs this first.

With CHAOS_DEVICES=2, a worker of `tfdist run` also gets two logical CPUs, as a machine with two
GPUs: TensorFlow takes devices only before it starts, and the launcher's worker starts it.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

_LEAN = Path(__file__).parents[2] / "tests" / "lean" / "sitecustomize.py"
runpy.run_path(str(_LEAN))
_COUNT = int(os.environ.get("CHAOS_DEVICES", "0"))
if _COUNT and "tfdist.scripts.worker_main" in sys.orig_argv:
    import tensorflow as tf

    (_cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        _cpu, [tf.config.LogicalDeviceConfiguration()] * _COUNT
    )
