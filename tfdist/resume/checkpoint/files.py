"""Checkpoints on disk: a folder each, made whole under another name and then renamed.

Tensors are in TensorFlow's own format, as `tf.train.load_checkpoint` reads it; the rest is
JSON. `SHA256SUMS` is what `sha256sum -c` takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfdist.errors import CheckpointError

Tensor = Any
_NAME = re.compile(r"epoch-(\d{5,})-step-(\d{7,})")
_STATE, _TENSORS, _SUMS = "state.json", "tensors", "SHA256SUMS"
_UNFINISHED = ".unfinished-"
_DAMAGED = "damaged-"


class Damaged(Exception):  # noqa: N818, says what a folder is
    """A checkpoint is not what was written."""


class Saved:
    """A checkpoint that was read and found whole.

    Args:
        folder: Where it is.
        state: What was saved besides tensors.

    Attributes:
        folder: Where it is.
        state: What was saved besides tensors.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder = folder
        self.state = state

    def tensors(self) -> Callable[[str], Tensor]:
        """Gives what reads a tensor, a NumPy array, by name."""
        read: Callable[[str], Tensor] = tf.train.load_checkpoint(
            str(self.folder / _TENSORS)
        ).get_tensor
        return read


def open_directory(directory: Path) -> None:
    """Makes sure that a directory can be written, and clears what a crash left there.

    Args:
        directory: Where checkpoints are to be.

    Raises:
        CheckpointError: It cannot be written.
    """
    probe = directory / f"{_UNFINISHED}probe-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            "`checkpoint` must be a directory that can be written. Received: "
            f"{str(directory)!r} ({error.strerror}). Choose another one."
        ) from None


def check_room(directory: Path, needed: int) -> None:
    """Refuses to begin where a checkpoint has no room.

    Args:
        directory: Where checkpoints are to be.
        needed: Bytes of one.

    Raises:
        CheckpointError: There is less.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            "`checkpoint` must be a directory with room for a checkpoint of "
            f"{needed / 2**20:.1f} MiB. Received: {str(directory)!r} with "
            f"{free / 2**20:.1f} MiB left. Make room, or choose another one."
        )


def latest(directory: Path) -> Saved | None:
    """Reads the last checkpoint that is whole.

    Those after it are renamed, so that they are not in the way, and named on standard error.

    Args:
        directory: Where checkpoints are.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        CheckpointError: There are some, and all are damaged.
    """
    folders = _folders(directory)
    for folder in reversed(folders):
        try:
            return Saved(folder, _verified(folder))
        except Damaged as reason:
            print(
                f"tfdist: warning: the checkpoint {folder} is damaged ({reason}) and is not "
                "used. The one before it is.",
                file=sys.stderr,
                flush=True,
            )
            damaged = folder.with_name(f"{_DAMAGED}{folder.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)
    if folders:
        raise CheckpointError(
            f"One checkpoint in {str(directory)!r} must be whole. Received: {len(folders)}, "
            "all damaged. Choose another directory to begin anew."
        )
    return None


def write(
    directory: Path,
    epoch: int,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> None:
    """Writes a checkpoint, whole or not at all, and removes old ones.

    Args:
        directory: Where to.
        epoch: It belongs to this epoch.
        step: It was made after so many steps of it.
        tensors: By name.
        state: All else; what JSON knows.
        keep: How many are kept, this one among them.

    Raises:
        CheckpointError: It could not be written.
    """
    name = f"epoch-{epoch:05d}-step-{step:07d}"
    part = directory / f"{_UNFINISHED}{name}-{os.getpid()}"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with tf.device("CPU:0"):
            tf.raw_ops.SaveV2(
                prefix=str(part / _TENSORS),
                tensor_names=list(tensors),
                shape_and_slices=[""] * len(tensors),
                tensors=list(tensors.values()),
            )
        (part / _STATE).write_text(json.dumps(state, default=lambda number: number.item()))
        sums = [f"{_digest(file)}  {file.name}\n" for file in sorted(part.iterdir())]
        (part / _SUMS).write_text("".join(sums))
        for file in (*part.iterdir(), part):
            _sync(file)
        final = directory / name
        if final.exists():  # the run was set back to before it, and made it again
            replaced = directory / f"{_UNFINISHED}replaced-{name}-{os.getpid()}"
            final.rename(replaced)
            part.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            part.rename(final)
        _sync(directory)
    except (OSError, tf.errors.OpError) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = getattr(error, "strerror", None) or getattr(error, "message", None) or error
        raise CheckpointError(
            f"A checkpoint must be written to {str(directory)!r}. Received: {reason}. The ones "
            "before it are still there: make room or mend the disk, and start again."
        ) from error
    for folder in _folders(directory)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(directory: Path) -> list[Path]:
    """Lists checkpoints in the order of training."""
    found = [(_NAME.fullmatch(p.name), p) for p in directory.iterdir() if p.is_dir()]
    numbered = [((int(m[1]), int(m[2])), path) for m, path in found if m is not None]
    return [path for _, path in sorted(numbered)]


def _verified(folder: Path) -> dict[str, Any]:
    try:
        lines = (folder / _SUMS).read_text().splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        missing = {_STATE, f"{_TENSORS}.index"} - expected.keys()
        if missing:
            raise Damaged(f"{_SUMS} does not list {min(missing)}")
        for name, digest in expected.items():
            if _digest(folder / name) != digest:
                raise Damaged(f"{name} has another checksum")
        state: dict[str, Any] = json.loads((folder / _STATE).read_text())
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(str(error)) from None
    return state


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
