"""One process of a place: does what tests ask for, in their order, and writes how it went.

python -m tests.places.program STRATEGY REPLICAS FOLDER

FOLDER/tasks lists the tasks, a line each: the module that knows how, and what. FOLDER gets a
file a task and worker.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import tfdist
from tests.jobs import write
from tests.places.clusters import Outcome, file_of

SEED = 7


def strategy_of(name: str, replicas: str) -> Any:
    """Gives what `init` is called with on a place, which has as many devices as it needs."""
    if name == "mirrored":
        (cpu,) = tf.config.list_physical_devices("CPU")
        devices = [tf.config.LogicalDeviceConfiguration()] * int(replicas)
        tf.config.set_logical_device_configuration(cpu, devices)
    if name == "parameter_server":  # parts so small that most variables are split
        return tfdist.ParameterServer(synchronous=True, min_part_bytes=256)
    return name


def do(task: str, folder: Path, strategy: Any) -> Outcome:
    """Does one task, from a known state of the session and of all that is random."""
    module, argument = task.split(" ", 1)
    started = time.monotonic()
    keras.backend.clear_session()
    tfdist.init(strategy, seed=SEED)
    shared = folder / task.replace(" ", ".")
    shared.mkdir(exist_ok=True)
    try:
        value = importlib.import_module(module).do(argument, shared)
        return Outcome(value, seconds=time.monotonic() - started)
    except Exception:
        return Outcome(error=traceback.format_exc())


def main(name: str, replicas: str, folder: Path) -> None:
    gc.freeze()  # what TensorFlow made when imported: a seventh of the time would go through it
    strategy = strategy_of(name, replicas)
    place = tfdist.init(strategy, seed=SEED).strategy.place
    for task in (folder / "tasks").read_text().splitlines():
        print(f"=== {task}", flush=True)
        write(do(task, folder, strategy), file_of(folder, task, place.worker_index))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
