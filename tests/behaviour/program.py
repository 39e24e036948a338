"""Runs all checks on this worker and writes how each ended.

python -m tests.behaviour.program FOLDER STRATEGY REPLICAS
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import tfdist
from tests.behaviour.checks import CHECKS
from tests.jobs import write


def main(folder: Path, strategy: str, replicas: int, *names: str) -> None:
    if strategy == "mirrored":
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
        )
    place = tfdist.init(strategy, seed=7).strategy.place
    for name in names or CHECKS:
        keras.utils.set_random_seed(7)
        keras.backend.clear_session()
        shared = folder / name
        shared.mkdir(exist_ok=True)
        try:
            CHECKS[name](shared)
            outcome = "passed"
        except pytest.skip.Exception as reason:
            outcome = f"skipped: {reason}"
        except Exception:
            outcome = traceback.format_exc()
        write(outcome, folder / f"{name}.worker-{place.worker_index}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
