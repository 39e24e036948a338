"""The training that `benchmarks.chaos` strikes from outside. It knows nothing of faults.

tfdist run -n 2 benchmarks/chaos_training.py FOLDER CHECKPOINTS [--servers sync|async]

FOLDER/digits.npz has the data, FOLDER/pace the seconds that a step takes at least. FOLDER gets
the time of each step of a worker (`steps-*`), and at last the state of each (`final-*`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

import tfdist

EPOCHS, BATCH, ROWS, EVERY = 4, 64, 512, 3


class Steps(keras.callbacks.Callback):  # type: ignore[misc]
    """Notes each step, and takes its time."""

    def __init__(self, folder: Path, worker: int) -> None:
        super().__init__()
        self.pace = folder / "pace"
        self.file = (folder / f"steps-{worker}").open("a")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = int(self.model.optimizer.iterations)
        self.file.write(f"{time.time()} {step} {os.getpid()}\n")
        self.file.flush()
        time.sleep(float(self.pace.read_text() or 0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--servers", choices=("sync", "async"))
    options = parser.parse_args()
    strategy: Any = {
        None: None,
        "sync": tfdist.ParameterServer(synchronous=True) if options.servers else None,
        # One step at a time: else the weights differ from run to run.
        "async": tfdist.ParameterServer(max_staleness=0) if options.servers else None,
    }[options.servers]
    arguments = {} if strategy is None else {"strategy": strategy}
    place = tfdist.init(seed=7, **arguments).strategy.place
    with np.load(options.folder / "digits.npz") as digits:
        x, y = digits["x"][:ROWS], digits["y"][:ROWS]
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1)
    every: Any = "epoch" if options.servers == "async" else EVERY
    history = tfdist.fit(
        model,
        x,
        y,
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_split=0.1,
        callbacks=[plateau, Steps(options.folder, place.worker_index)],
        checkpoint=tfdist.Checkpoint(options.checkpoints, every=every),
        verbose=0,
    )
    variables = (*model.variables, *model.optimizer.variables)
    state = {str(number): np.asarray(variable) for number, variable in enumerate(variables)}
    state["history"] = np.asarray(json.dumps(history.history, sort_keys=True, default=float))
    np.savez(options.folder / f"final-{place.worker_index}.npz", **state)


if __name__ == "__main__":
    main()
