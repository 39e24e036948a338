"""Saves the state of a training: who writes which tensors, and where."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfdist.resume.checkpoint import files, reading, shards, tensors
from tfdist.resume.checkpoint.lease import Lease
from tfdist.resume.checkpoint.reading import LastCheckpoint
from tfdist.resume.checkpoint.settings import Checkpoint
from tfdist.resume.checkpoint.shards import Piece, Shard, TensorReader
from tfdist.resume.checkpoint.writer import Writer
from tfdist.step.prepared import PreparedModel
from tfdist.step.state import TrainState
from tfdist.strategies.base import Strategy

# What the chief keeps of other processes' parts at a time, in bytes.
_KEPT = 2**26


class Saver:
    """Saves the state of one training.

    The chief writes what all replicas have. If all processes can use the directory, each one
    writes the parts of its replicas. Otherwise the chief gets them one by one, and writes them
    as they come. So no process ever has all parts.

    Args:
        settings: The user's settings.
        strategy: The strategy that connects the processes.
        lease: The lease of the directory.

    Attributes:
        writer: Writes in a thread.
        is_shared: Whether each process writes, and reads, the parts of its replicas.
    """

    def __init__(self, settings: Checkpoint, strategy: Strategy, lease: Lease) -> None:
        self._settings = settings
        self._strategy = strategy
        self._lease = lease
        self._token = ""
        self._state, self._computing = TrainState(()), strategy
        self.writer = Writer()
        self.is_shared = False

    def begin(self, prepared: PreparedModel, token: str) -> None:
        """Decides who writes. All processes must call it.

        Args:
            prepared: The model whose state will be saved.
            token: The token of the chief's lease.
        """
        self._state, self._computing, self._token = prepared.state, prepared.strategy, token
        self.is_shared = self.is_joint and reading.is_shared(
            self._settings.path, token, self._strategy
        )

    @property
    def is_joint(self) -> bool:
        """Whether all processes must save at the same step."""
        return not self._state.is_everywhere and self._computing.place.num_workers > 1

    def restore(self, last: LastCheckpoint) -> None:
        """Restores the tensors of a checkpoint. All processes must call it.

        Args:
            last: The checkpoint.
        """
        assert last.state is not None
        reader = last.reader
        if reader is None and self.is_shared:
            reader = TensorReader(self._settings.path / Path(last.state["folder"]).name)
        has_seed = bool(last.state["global_seed"])
        with self._state.showing_parts():
            tensors.put_back(self._computing, self._state, reader, has_seed, self.is_shared)

    def save(
        self,
        epoch: int,
        step: int,
        state_of: Callable[[list[Any]], dict[str, Any]],
        is_secret: bool,
    ) -> None:
        """Saves. If it is joint, all processes must call it; if not, all may.

        Args:
            epoch: The epoch of the checkpoint.
            step: Number of completed steps of the epoch.
            state_of: Returns all state but the tensors. It gets a list for its arrays.
            is_secret: Whether no other user of the machine may read the checkpoint.

        Raises:
            CheckpointError: The previous checkpoint could not be written.
        """
        place, path = self._strategy.place, self._settings.path
        if not (place.is_chief or self.is_joint):
            return
        # One checkpoint is written at a time. An error of the previous one is raised here.
        self.writer.finish()
        with self._state.showing_parts():
            pieces = tensors.take(self._computing, self._state)
        folder = files.unfinished_folder(path, epoch, step, self._token)
        of_others: Callable[[], Sequence[Shard]] = tuple
        if self.is_shared:
            number = place.worker_index
            if not place.is_chief:
                write = functools.partial(
                    shards.write_for_chief, folder, number, pieces, is_secret
                )
                self.writer.begin(write)
                return
            others, is_given_up = range(1, place.num_workers), lambda: self.writer.is_given_up
            of_others = functools.partial(shards.of_others, folder, others, is_given_up)
        elif self.is_joint:
            received = _Received(folder, is_secret)
            with self._state.showing_parts():
                for part in tensors.of_others(self._computing, self._state):
                    received.add(part)
            of_others = received.shards
        if not place.is_chief:
            return
        arrays: list[Any] = []
        state = state_of(arrays)
        pieces += [
            Piece(f"arrays/{number}", tf.convert_to_tensor(array))
            for number, array in enumerate(arrays)
        ]
        self.writer.begin(
            functools.partial(
                files.write,
                path,
                epoch,
                step,
                pieces,
                state,
                self._settings.keep,
                self._lease.check,
                self._token,
                of_others,
                is_secret,
            )
        )


class _Received:
    """What the chief receives of other processes. It is written before more is kept.

    A failure is raised later: the processes that send know nothing of it, and go on.

    Args:
        folder: The folder of the checkpoint.
        is_secret: As in `shards.make_folder`.
    """

    def __init__(self, folder: Path, is_secret: bool) -> None:
        self._folder, self._is_secret = folder, is_secret
        self._pieces: list[Piece] = []
        self._shards: list[Shard] = []
        self._failure: Exception | None = None

    def add(self, pieces: Sequence[Piece]) -> None:
        """Adds pieces, and writes if there are many."""
        self._pieces += pieces
        tensors_kept = [piece.tensor for piece in self._pieces]
        if sum(t.shape.num_elements() * t.dtype.size for t in tensors_kept) > _KEPT:
            self._write()

    def shards(self) -> list[Shard]:
        """Returns what was written.

        Raises:
            OSError: It could not be written.
            tf.errors.OpError: It could not be written.
        """
        self._write()
        if self._failure is not None:
            raise self._failure
        return self._shards

    def _write(self) -> None:
        pieces, self._pieces = self._pieces, []
        if self._failure is not None:
            return
        try:
            shards.make_folder(self._folder, self._is_secret)
            shard = shards.write_shard(self._folder, len(self._shards) + 1, pieces)
        except (OSError, tf.errors.OpError) as error:
            self._failure = error
            return
        self._shards += [shard] if shard is not None else []
