"""The files with the tensors of a checkpoint, in TensorFlow's format.

Each process writes its tensors, and its slices of tensors, to a file of its own, which is a
checkpoint by itself. The chief merges them: `MergeV2Checkpoints` renames the files and writes
one index for all. TensorFlow's tools then see whole tensors.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfdist.cluster.environment import limit_of
from tfdist.errors import CheckpointError
from tfdist.resume.checkpoint.slices import Slice, joined
from tfdist.watchdog.timeouts import STEP_TIMEOUT

Tensor = Any
Specs = Mapping[str, tuple[tuple[int, ...], str]]
TENSORS = "tensors"
INDEX = f"{TENSORS}.index"
# Seconds without progress of other processes, after which a training that has failed does not
# wait for them any more.
_GIVEN_UP_AFTER_S = 15.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint, or a slice of one.

    Attributes:
        name: The tensor's name.
        tensor: Its value, or that of the slice.
        slice: The slice, or None for the whole tensor.
    """

    name: str
    tensor: Tensor
    slice: Slice | None = None


@dataclass(frozen=True)
class Shard:
    """A file of tensors that one process has written.

    Attributes:
        name: Its name within the folder, without the ending.
        size: Number of bytes.
        digest: Its checksum.
    """

    name: str
    size: int
    digest: str


def make_folder(folder: Path, is_secret: bool) -> None:
    """Makes the folder of a checkpoint, if another process has not made it.

    Args:
        folder: The folder.
        is_secret: Whether no other user of the machine may look into it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700 if is_secret else 0o777, exist_ok=True)


def write_shard(folder: Path, number: int, pieces: Sequence[Piece]) -> Shard | None:
    """Writes tensors to the disk.

    Args:
        folder: The folder of the checkpoint.
        number: The shard's number within the folder.
        pieces: The tensors.

    Returns:
        The shard, or None if there are no tensors.
    """
    if not pieces:
        return None
    name = f"shard-{number:05d}"
    with tf.device("CPU:0"):
        tf.raw_ops.SaveV2(
            prefix=str(folder / name),
            tensor_names=[piece.name for piece in pieces],
            shape_and_slices=["" if p.slice is None else p.slice.spec for p in pieces],
            tensors=[piece.tensor for piece in pieces],
        )
    file = folder / f"{name}.data-00000-of-00001"
    sync(file)
    return Shard(name, file.stat().st_size, digest_of(file))


def merge(folder: Path, shards: Sequence[Shard]) -> dict[str, str]:
    """Makes one checkpoint of shards.

    Args:
        folder: The folder of the checkpoint.
        shards: All of its shards.

    Returns:
        The checksum of each file of tensors, by its name.

    Raises:
        CheckpointError: A shard has another size than when it was written.
    """
    with tf.device("CPU:0"):
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=[str(folder / shard.name) for shard in shards],
            destination_prefix=str(folder / TENSORS),
            delete_old_dirs=False,
        )
    digests = {}
    for number, shard in enumerate(shards):
        file = folder / f"{TENSORS}.data-{number:05d}-of-{len(shards):05d}"
        if (size := file.stat().st_size) != shard.size:
            raise CheckpointError(
                "All processes must write a checkpoint to the same disk. Received: "
                f"{size} bytes in {file}, where a process has written {shard.size}."
            )
        digests[file.name] = shard.digest
    return digests


# --- the other processes ------------------------------------------------------------------


def write_for_chief(
    folder: Path, number: int, pieces: Sequence[Piece], is_secret: bool = False
) -> None:
    """Writes this process's shard, and tells the chief, also of a failure.

    Args:
        folder: The folder of the checkpoint, which all processes see.
        number: This process's number.
        pieces: This process's tensors.
        is_secret: As in `make_folder`.

    Raises:
        CheckpointError: The shard could not be written.
    """
    try:
        make_folder(folder, is_secret)
        shard = write_shard(folder, number, pieces)
        _note(folder, number, {} if shard is None else asdict(shard))
    except (OSError, tf.errors.OpError) as error:
        reason = reason_of(error)
        with contextlib.suppress(OSError):
            _note(folder, number, {"error": reason})
        raise CheckpointError(
            f"A checkpoint must be written to {str(folder.parent)!r} by all processes. "
            f"Received: {reason} in process {number}. The ones before it are still there: make "
            "room or mend the disk, and start again."
        ) from error


def _note(folder: Path, number: int, content: dict[str, Any]) -> None:
    file = folder / f"note-{number:05d}"
    unfinished = file.with_name(f"{file.name}.part")
    unfinished.write_text(json.dumps(content))
    unfinished.rename(file)


def of_others(
    folder: Path, numbers: Iterable[int], is_given_up: Callable[[], bool] = lambda: False
) -> list[Shard]:
    """Waits until other processes have written their shards.

    Args:
        folder: The folder of the checkpoint, which all processes see.
        numbers: The numbers of the processes.
        is_given_up: Whether the training has failed. Then a process that writes nothing any
            more is not waited for.

    Returns:
        The shards of those that have one.

    Raises:
        CheckpointError: A process could not write, or has not written for too long.
    """
    limit = limit_of(STEP_TIMEOUT, 1800)
    shards, progress, since = [], -1, time.monotonic()
    for number in numbers:
        note = folder / f"note-{number:05d}"
        while not note.exists():
            if (size := _size(folder)) != progress:
                progress, since = size, time.monotonic()
            waited = time.monotonic() - since
            if 0 < limit < waited or (is_given_up() and waited > _GIVEN_UP_AFTER_S):
                raise CheckpointError(
                    "All processes must write their part of a checkpoint. Received: nothing "
                    f"from process {number} for {waited:.0f} s ({STEP_TIMEOUT}). The "
                    f"checkpoints before it are still in {str(folder.parent)!r}."
                )
            time.sleep(_POLL_S)
        content = json.loads(note.read_text())
        note.unlink()
        if "error" in content:
            raise OSError(0, f"{content['error']} in process {number}")
        if content:
            shards.append(Shard(**content))
    return shards


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):  # a file is renamed just now
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0


# --- reading ------------------------------------------------------------------------------


class TensorReader:
    """Reads the tensors of a checkpoint, whole or in slices.

    Args:
        folder: The folder of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = str(folder / TENSORS)

    @functools.cached_property
    def _reader(self) -> Any:
        return tf.train.load_checkpoint(self._prefix)

    @functools.cached_property
    def specs(self) -> Specs:
        """The shape and the type of each tensor, by name."""
        with self._explaining(INDEX):
            types = self._reader.get_variable_to_dtype_map()
            shapes = self._reader.get_variable_to_shape_map()
        return {name: (tuple(shape), types[name].name) for name, shape in shapes.items()}

    def whole(self, name: str) -> Any:
        """Returns a tensor as an array.

        Args:
            name: Its name.

        Raises:
            CheckpointError: It cannot be read.
        """
        with self._explaining(name):
            return self._reader.get_tensor(name)

    def part(self, name: str, slices: Sequence[Slice], shape: Sequence[int]) -> Any:
        """Returns a part of a tensor as an array, padded with zeros.

        Args:
            name: The tensor's name.
            slices: The slices of the part.
            shape: The shape of the part.

        Raises:
            CheckpointError: It cannot be read.
        """
        dtype = tf.as_dtype(self.specs[name][1])
        if not slices:
            return joined([], tuple(shape), dtype.as_numpy_dtype)
        with self._explaining(name), tf.device("CPU:0"):
            tensors = tf.raw_ops.RestoreV2(
                prefix=self._prefix,
                tensor_names=[name] * len(slices),
                shape_and_slices=[one.spec for one in slices],
                dtypes=[dtype] * len(slices),
            )
        return joined([t.numpy() for t in tensors], tuple(shape), dtype.as_numpy_dtype)

    @contextlib.contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        try:
            yield
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"A checkpoint must have all of its tensors. Received: {name!r} in "
                f"{self._folder}, of which a slice is missing or damaged "
                f"({reason_of(error)}). Begin with an older checkpoint: move this one away."
            ) from None


# --- files --------------------------------------------------------------------------------


def reason_of(error: Exception) -> Any:
    """Returns why a file could not be written or read, in a few words.

    Args:
        error: The error.
    """
    return getattr(error, "strerror", None) or getattr(error, "message", None) or error


def digest_of(file: Path) -> str:
    """Computes a checksum.

    Args:
        file: The file.
    """
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Makes sure that a file or a folder is on the disk.

    Args:
        path: The file or folder.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
