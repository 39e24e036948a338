"""Reads the checkpoint from which a training continues. The chief reads it for all workers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfdist.errors import CheckpointError
from tfdist.resume.checkpoint import files, same, tensors
from tfdist.resume.checkpoint.lease import Lease, token_in
from tfdist.resume.checkpoint.shards import Specs, TensorReader
from tfdist.step.prepared import PreparedModel
from tfdist.strategies.base import Strategy

FORMAT = 3

_FIELDS_OF_ALL: Mapping[str, type] = {"format": int, "tfdist": str, "arrays": int}
_FIELDS: Mapping[str, type] = {
    "position": list,
    "initial_epoch": int,
    "steps": int,
    "stopped": bool,
    "setup": dict,
    "others": dict,
    "callbacks": dict,
    "global_seed": bool,
}


@dataclass(frozen=True)
class LastCheckpoint:
    """The content of the last checkpoint in a directory.

    Attributes:
        state: The state without tensors; None if there is no checkpoint.
        arrays: The arrays to which `state` refers, by number.
        token: The token of the chief's lease.
        reader: Reads the tensors. None on other workers than the chief.
    """

    state: dict[str, Any] | None = None
    arrays: dict[int, Any] = field(default_factory=dict)
    token: str = ""
    reader: TensorReader | None = None


def last_checkpoint(lease: Lease, path: Path, strategy: Strategy) -> LastCheckpoint:
    """Reads the last checkpoint on the chief, and sends its state to all workers.

    Args:
        lease: The lease of the directory, which the chief takes.
        path: The directory.
        strategy: The strategy that connects the workers.

    Raises:
        CheckpointError: The directory or the checkpoint cannot be used.
    """
    problem, state, arrays, reader = None, None, {}, None
    if strategy.place.is_chief:
        try:
            files.make_directory(path)
            lease.take()
            files.remove_unfinished(path)
            saved = files.latest(path)
            if saved is not None:
                reader, state = saved.tensors, saved.state
                state["folder"] = str(saved.folder)
                _check(state, _FIELDS_OF_ALL)
                names = _arrays(state, reader.specs)
                arrays = {i: reader.whole(name) for i, name in enumerate(names)}
        except CheckpointError as error:
            problem = str(error)
            lease.release()
    # An error of the chief is sent as well. Otherwise the other workers would wait for a state
    # that never comes.
    problem, state, arrays, token = strategy.broadcast_object(
        (problem, state, arrays, lease.token)
    )
    if problem is not None:
        raise CheckpointError(problem)
    if state is not None and state["format"] != FORMAT:
        raise CheckpointError(
            f"A checkpoint must be of format {FORMAT}. Received: {state['folder']} of "
            f"format {state['format']}. Use tfdist {state['tfdist']}, which wrote it."
        )
    if state is not None:
        _check(state, _FIELDS)
    return LastCheckpoint(state, arrays, token, reader)


def is_shared(path: Path, token: str, strategy: Strategy) -> bool:
    """Returns whether all workers can read and write the chief's directory. All must call it.

    Args:
        path: The directory.
        token: The token of the chief's lease.
        strategy: The strategy that connects the workers.
    """
    sees_it = token != "" and token_in(path) == token
    if sees_it:
        try:
            files.make_directory(path)
        except CheckpointError:
            sees_it = False
    return all(strategy.gather_objects(sees_it))


def _check(state: dict[str, Any], kinds: Mapping[str, type]) -> None:
    """Refuses a state that lacks fields, or has other ones than tfdist writes."""
    wrong = [name for name, kind in kinds.items() if type(state.get(name)) is not kind]
    if wrong:
        raise CheckpointError(
            "The state of a checkpoint must be as tfdist writes it. Received: "
            f"{state['folder']} with {wrong[0]}={str(state.get(wrong[0]))[:40]}. Continue from "
            "another checkpoint."
        )


def _arrays(state: dict[str, Any], specs: Specs) -> list[str]:
    """Returns the names of the arrays that a state refers to."""
    names = [f"arrays/{i}" for i in range(min(state["arrays"], len(specs)))]
    if len(names) < state["arrays"] or not specs.keys() >= {*names}:
        raise CheckpointError(
            "The arrays of a checkpoint must be among its tensors. Received: "
            f"{state['folder']}, which lacks some of {state['arrays']}. Continue from another "
            "checkpoint."
        )
    return names


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
            if last.state is not None and last.reader is not None:
                with prepared.state.showing_parts():
                    tensors.check(prepared.state, last.reader, last.state)
        except CheckpointError as error:
            problem = str(error)
    # On all workers, or the others would begin a training that the chief has refused.
    problem = strategy.broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(problem)


def notice_of(
    state: dict[str, Any], setup: dict[str, Any], epochs: int, warns: bool = False
) -> str:
    """Returns a line about the checkpoint from which a training continues.

    Args:
        state: The state of the checkpoint.
        setup: The description of the present training, from `same.describe`.
        epochs: The argument `epochs` of `fit`.
        warns: Whether to warn, if the line is not shown, that the checkpoint has more epochs.
    """
    folder, epoch = state["folder"], state["position"][0]
    if state["stopped"]:
        return (
            f"a callback ended the training in {folder} after epoch {epoch}: nothing is "
            "left to train. Pass another directory to train anew."
        )
    if epoch > epochs:
        text = (
            f"{folder} has {epoch} epochs, and {epochs} are asked for: nothing is left to "
            f"train, and the weights are those after epoch {epoch}. Raise `epochs`, or pass "
            "another directory to train anew."
        )
        if warns:
            print(f"tfdist: warning: {text}", file=sys.stderr, flush=True)
        return text
    if epoch == epochs:
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
