"""Reads the checkpoint from which a training continues. The chief reads it for all workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfdist.errors import CheckpointError
from tfdist.resume.checkpoint import files, same, tensors
from tfdist.resume.checkpoint.lease import Lease
from tfdist.step.prepared import PreparedModel
from tfdist.strategies.base import Strategy

FORMAT = 3


@dataclass(frozen=True)
class LastCheckpoint:
    """The content of the last checkpoint in a directory.

    Attributes:
        state: The state without tensors; None if there is no checkpoint.
        arrays: The arrays to which `state` refers, by number.
        read: Returns a tensor by its name. None on other workers than the chief.
        specs: Shape and type of each tensor, by name. Empty on other workers.
    """

    state: dict[str, Any] | None = None
    arrays: dict[int, Any] = field(default_factory=dict)
    read: Callable[[str], Any] | None = None
    specs: files.Specs = field(default_factory=dict)


def last_checkpoint(lease: Lease, path: Path, strategy: Strategy) -> LastCheckpoint:
    """Reads the last checkpoint on the chief, and sends its state to all workers.

    Args:
        lease: The lease of the directory, which the chief takes.
        path: The directory.
        strategy: The strategy that connects the workers.

    Raises:
        CheckpointError: The directory or the checkpoint cannot be used.
    """
    problem, state, arrays, read = None, None, {}, None
    specs: files.Specs = {}
    if strategy.place.is_chief:
        try:
            files.make_directory(path)
            lease.take()
            files.remove_unfinished(path)
            saved = files.latest(path)
            if saved is not None:
                read, state, specs = saved.tensors(), saved.state, saved.specs()
                state["folder"] = str(saved.folder)
                arrays = {i: read(f"arrays/{i}") for i in range(state["arrays"])}
        except CheckpointError as error:
            problem = str(error)
            lease.release()
    # An error of the chief is sent as well. Otherwise the other workers would wait for a state
    # that never comes.
    problem, state, arrays = strategy.broadcast_object((problem, state, arrays))
    if problem is not None:
        raise CheckpointError(problem)
    if state is not None and state["format"] != FORMAT:
        raise CheckpointError(
            f"A checkpoint must be of format {FORMAT}. Received: {state['folder']} of "
            f"format {state['format']}. Use tfdist {state['tfdist']}, which wrote it."
        )
    return LastCheckpoint(state, arrays, read, specs)


def check_before_training(
    path: Path, last: LastCheckpoint, prepared: PreparedModel, strategy: Strategy
) -> None:
    """Checks the disk and the tensors to restore on the chief, and tells all workers.

    Args:
        path: The directory.
        last: The checkpoint from which the training continues, if there is one.
        prepared: The model that is about to be trained.
        strategy: The strategy that connects the workers.

    Raises:
        CheckpointError: The disk has no room, or a tensor does not fit; on all workers.
    """
    problem = None
    if strategy.place.is_chief:
        try:
            replicas = prepared.strategy.place.num_replicas
            files.check_room(path, tensors.size_of(prepared.state, replicas))
            if last.state is not None and last.read is not None:
                tensors.check(prepared.state, last.read, last.specs, last.state)
        except CheckpointError as error:
            problem = str(error)
    # On all workers, or the others would begin a training that the chief has refused.
    problem = strategy.broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(problem)


def notice_of(state: dict[str, Any], setup: dict[str, Any], epochs: int) -> str:
    """Returns a line about the checkpoint from which a training continues.

    Args:
        state: The state of the checkpoint.
        setup: The description of the present training, from `same.describe`.
        epochs: The argument `epochs` of `fit`.
    """
    folder, epoch = state["folder"], state["position"][0]
    if state["stopped"]:
        return (
            f"a callback ended the training in {folder} after epoch {epoch}: nothing is "
            "left to train. Pass another directory to train anew."
        )
    if epoch >= epochs:
        return (
            f"{folder} has all {epochs} epochs: nothing is left to train. Raise `epochs`, "
            "or pass another directory to train anew."
        )
    text = f"training goes on from {folder}"
    if same.has_other_contents(setup, state["setup"]):
        text += (
            ", with other values in its arrays than it was trained on. If that is not "
            "meant, pass another directory."
        )
    return text
