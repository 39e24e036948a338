"""A training on real digits that faults strike, each once, however often it is started again.

tfdist run -n 2 --max-restarts 5 tests/faults/training.py FOLDER

FOLDER/faults.json lists the faults. FOLDER gets the checkpoints, the time of each step of a
worker (`steps-*`), of a fault (`struck-*`), and at last the state of each worker (`final-*`).
If a fault is to strike then, a private training follows. Its steps are in `private-*`, and what
its ledger counts in `ledger-*`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
from sklearn.datasets import load_digits

import tfdist

EPOCHS, BATCH, EVERY = 2, 64, 4
SLOW_S = 6.0


@dataclass(frozen=True)
class Fault:
    """What happens, when, and to whom.

    Attributes:
        kind: "kill", "stop", "terminate", "memory", "exception" or "slow".
        moment: "start", "step" (in the middle of one), "saving", "end" or "private".
        step: Of the whole training, for "step"; the first one saved from there, for "saving";
            of those that a worker made of the private training, for "private".
        task: "worker 1", or with parameter servers "ps 0" or "chief" too.
    """

    kind: str
    moment: str
    step: int
    task: str


class Faults(keras.callbacks.Callback):  # type: ignore[misc]
    """Strikes each fault once in the life of the folder."""

    def __init__(self, folder: Path, faults: Sequence[Fault], task: str, leads: bool) -> None:
        super().__init__()
        self.folder = folder
        self.faults = dict(enumerate(faults))
        self.task = task
        self.leads = leads  # the chief strikes the servers, which run no script
        self.steps = (folder / f"steps-{task.replace(' ', '-')}").open("a")

    @property
    def step(self) -> int:
        return int(self.model.optimizer.iterations) if self.model is not None else 0

    def strike(self, moment: str, step: int | None = None) -> None:
        step = self.step if step is None else step
        for number, fault in self.faults.items():
            ours = self.task == fault.task or (self.leads and fault.task != "chief")
            due = moment == fault.moment and (moment in ("start", "end") or step == fault.step)
            if ours and due and self.is_first(number):
                self.hit(fault)

    def is_first(self, number: int) -> bool:
        try:
            with (self.folder / f"struck-{number}").open("x") as note:
                note.write(f"{time.time()} {self.step}")
        except FileExistsError:
            return False
        return True

    def hit(self, fault: Fault) -> None:
        if fault.kind in SIGNALS:
            pid = os.getpid() if fault.task == self.task else pid_of(fault.task)
            number = SIGNALS[fault.kind]
            if fault.moment == "step":  # some way into it
                delay = np.random.default_rng(fault.step).uniform(0, 0.02)
                threading.Timer(delay, os.kill, (pid, number)).start()
            else:
                os.kill(pid, number)
        elif fault.kind == "memory":
            used = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (used, used))
            taken = []
            while True:
                taken.append(np.ones(1 << 24))
        elif fault.kind == "exception":
            raise RuntimeError("a mistake in a callback")
        else:
            time.sleep(SLOW_S)

    def watch_saving(self) -> None:
        """Strikes while a checkpoint is being written: its folder has another name then."""
        waiting = [
            (n, f)
            for n, f in self.faults.items()
            if f.moment == "saving" and not (self.folder / f"struck-{n}").exists()
        ]

        def watch() -> None:
            for number, fault in waiting:
                while not any(
                    int(path.name.split("-")[-2]) >= fault.step % STEPS_PER_EPOCH
                    for path in (self.folder / "checkpoints").glob(".unfinished-epoch-*")
                ):
                    time.sleep(0.0002)
                if self.is_first(number):
                    self.hit(fault)

        if self.leads or self.task in ("worker 0", "chief"):
            threading.Thread(target=watch, daemon=True).start()

    def on_train_begin(self, logs: Any = None) -> None:
        self.watch_saving()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.strike("step")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.steps.write(f"{time.time()} {self.step} {os.getpid()}\n")
        self.steps.flush()


class PrivateSteps(keras.callbacks.Callback):  # type: ignore[misc]
    """Notes each private step when it is made."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self.faults = faults
        self.path = faults.folder / f"private-{faults.task.replace(' ', '-')}"

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        with self.path.open("a") as file:
            file.write(".")
        self.faults.strike("private", self.path.stat().st_size)


def train_privately(x: Any, y: Any, faults: Faults) -> None:
    """Trains once more, with a private step that is struck."""
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = tfdist.fit(
        model,
        x,
        y,
        batch_size=BATCH,
        callbacks=[PrivateSteps(faults)],
        checkpoint=tfdist.Checkpoint(faults.folder / "private", every=EVERY),
        privacy=tfdist.DPSGD(l2_norm_clip=1.0, noise_multiplier=4.0, delta=1e-4),
        verbose=0,
    )
    counted = faults.folder / f"ledger-{faults.task.replace(' ', '-')}"
    counted.write_text(str(history.privacy.ledger.steps))


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}
ROWS = 1797
STEPS_PER_EPOCH = -(-ROWS // BATCH)


def pid_of(task: str) -> int:
    """Finds a process beside this one by its place in the cluster."""
    for process in psutil.Process(os.getppid()).children():
        config = json.loads(process.environ().get("TF_CONFIG", "{}"))
        place = config.get("task", {})
        if f"{place.get('type')} {place.get('index')}" == task:
            return process.pid
    raise RuntimeError(f"no {task}")


def main(folder: Path) -> dict[str, Any]:
    config = json.loads(os.environ.get("TF_CONFIG", "{}"))
    serves = "ps" in config.get("cluster", {})
    place = tfdist.init(
        tfdist.ParameterServer(synchronous=True) if serves else "auto", seed=5
    ).strategy.place
    task = "chief" if serves else f"worker {place.worker_index}"
    digits = load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    written = json.loads((folder / "faults.json").read_text())
    faults = Faults(folder, [Fault(**fault) for fault in written], task, leads=serves)
    faults.strike("start")
    history = tfdist.fit(
        model,
        x,
        y,
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=(x[:300], y[:300]),
        callbacks=[faults],
        checkpoint=tfdist.Checkpoint(folder / "checkpoints", every=EVERY),
        verbose=0,
    )
    faults.strike("end")
    variables = (*model.variables, *model.optimizer.variables)
    state = {str(number): np.asarray(variable) for number, variable in enumerate(variables)}
    state["history"] = np.asarray(json.dumps(history.history, sort_keys=True))
    np.savez(folder / f"final-{task.replace(' ', '-')}.npz", **state)
    if any(fault.moment == "private" for fault in faults.faults.values()):
        train_privately(x, y, faults)
    return state


def do(argument: str, folder: Path) -> dict[str, Any]:
    """Trains without faults, as a task of a place.

    Args:
        argument: Of no meaning.
        folder: As `main`'s.
    """
    (folder / "faults.json").write_text("[]")
    return main(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
