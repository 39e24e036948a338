"""What must hold of checkpoints, in one process and on every worker of a cluster alike."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest

import tfdist
from tests.behaviour.checks import level, place
from tests.behaviour.registry import (
    HOROVOD,
    MIRRORED,
    MULTI_WORKER,
    SERVERS,
    SINGLE,
    WORKERS,
    check,
)
from tests.equivalence.cases import clipped_sgd, mlp, table
from tfdist.errors import CheckpointError


class StoppedError(Exception):
    pass


class Stop(keras.callbacks.Callback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if not self.left:
            raise StoppedError


def untrained() -> Any:
    keras.utils.set_random_seed(7)
    return mlp(clipped_sgd())


def train(model: Any, checkpoint: Any, *extra: Any, **options: Any) -> tuple[list[Any], Any]:
    """Trains a model from the beginning; one that was trained before needs no new tracing."""
    level(model, untrained())
    history = tfdist.fit(
        model,
        *table(),
        batch_size=128,
        epochs=3,
        validation_data=table(101),
        verbose=0,
        checkpoint=checkpoint,
        callbacks=[
            keras.callbacks.EarlyStopping("val_loss", restore_best_weights=True, patience=1),
            keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10.0),
            *extra,
        ],
        **options,
    )
    state = [np.asarray(v) for v in (*model.variables, *model.optimizer.variables)]
    return state, history.history


@check(MIRRORED)  # on processes, real faults say so: tests/faults
def a_stopped_training_ends_with_the_same_bits(folder: Path) -> None:
    model = untrained()
    expected, history = train(model, None)
    for step, every in ((3, 1), (8, 8), (12, "epoch")):  # 8 steps an epoch
        # Each worker has a directory of its own: the chief's alone is used.
        own = folder / f"{step}-{place().worker_index}"
        checkpoint = tfdist.Checkpoint(own, every=every)
        with pytest.raises(StoppedError):
            train(model, checkpoint, Stop(step))
        found, logs = train(model, checkpoint)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert logs == history
        assert own.exists() == place().is_chief


class Warned(keras.callbacks.Callback):
    """Gets a signal at its tenth step, on one worker."""

    steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.steps += 1
        if self.steps == 10 and place().worker_index == place().num_workers - 1:
            os.kill(os.getpid(), signal.SIGUSR1)


@check(MULTI_WORKER, full=(SINGLE, HOROVOD, SERVERS))
def a_warning_to_one_worker_saves_and_training_goes_on(folder: Path) -> None:
    checkpoint = tfdist.Checkpoint(folder / "c", every=1000, keep=9)
    _, history = train(untrained(), checkpoint, Warned())
    assert len(history["loss"]) > 1
    if place().is_chief:
        # With others, the next step tells them. The end of training is always saved.
        step = 2 if place().num_workers == 1 else 3
        names = sorted(path.name for path in (folder / "c").iterdir())
        assert names[0] == f"epoch-00001-step-{step:07d}"
        assert len(names) > 1


@check(*WORKERS)
def an_unwritable_directory_is_refused_on_every_worker(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(CheckpointError, match="must be a directory that can be written"):
        train(untrained(), folder / "file" / "below")


@check(*WORKERS)
def a_full_disk_of_the_chief_is_refused_on_every_worker(folder: Path) -> None:
    space = shutil.disk_usage(folder)
    if place().is_chief:  # the others have no disk that counts
        space = space._replace(free=1)
    with (
        mock.patch.object(shutil, "disk_usage", return_value=space),
        pytest.raises(CheckpointError, match="room for a checkpoint"),
    ):
        train(untrained(), folder / "c")
