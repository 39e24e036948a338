"""Checkpoints on disk. Each is a folder, written under a temporary name and then renamed.

Tensors are in TensorFlow's own format, which `tf.train.load_checkpoint` reads. All other state
is JSON. You can check `SHA256SUMS` with `sha256sum -c`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfdist.cluster import strict_json
from tfdist.errors import CheckpointError
from tfdist.resume.checkpoint.shards import (
    INDEX,
    TENSORS,
    Piece,
    Shard,
    TensorReader,
    digest_of,
    make_folder,
    merge,
    reason_of,
    sync,
    write_shard,
)

_NAME = re.compile(r"epoch-(\d{5,})-step-(\d{7,})")
_DATA = re.compile(r"tensors\.data-\d{5}-of-(\d{5})")
_STATE, _SUMS = "state.json", "SHA256SUMS"
_MOST_STATE_BYTES, _MOST_DEPTH = 1 << 30, 200
_UNFINISHED = ".unfinished-"
_DAMAGED = "damaged-"


class DamagedCheckpoint(Exception):  # noqa: N818, describes a folder
    """A checkpoint is incomplete or has been changed."""


class SavedCheckpoint:
    """A checkpoint on disk whose checksums are right.

    Args:
        folder: Its folder.
        state: The saved state without tensors.

    Attributes:
        folder: Its folder.
        state: The saved state without tensors.
        tensors: Reads its tensors.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder = folder
        self.state = state
        self.tensors = TensorReader(folder)


def make_directory(directory: Path) -> None:
    """Makes a directory, unless it exists, and makes sure that it is writable.

    Args:
        directory: The directory of the checkpoints.

    Raises:
        CheckpointError: The directory is not writable.
    """
    probe = directory / f"{_UNFINISHED}probe-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            "`checkpoint` must be a directory that can be written. Received: "
            f"{str(directory)!r} ({error.strerror}). Choose another one."
        ) from None


def remove_unfinished(directory: Path) -> None:
    """Removes what a crash left in a directory.

    Args:
        directory: The directory of the checkpoints, of which this process has the lease.
    """
    for unfinished in directory.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def check_room(directory: Path, num_bytes: int) -> None:
    """Checks that the disk has room for a checkpoint.

    Args:
        directory: The directory of the checkpoints.
        num_bytes: Number of bytes of a checkpoint.

    Raises:
        CheckpointError: The disk has less room.
    """
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(
            "`checkpoint` must be a directory with room for a checkpoint of "
            f"{num_bytes / 2**20:.1f} MiB. Received: {str(directory)!r} with "
            f"{free / 2**20:.1f} MiB left. Make room, or choose another one."
        )


def latest(directory: Path) -> SavedCheckpoint | None:
    """Reads the last checkpoint that is not damaged.

    Damaged checkpoints after it are renamed, with a warning on standard error. Where all are
    damaged, nothing is renamed, so that another try does not begin anew in silence.

    Args:
        directory: The directory of the checkpoints.

    Returns:
        The checkpoint, or None if the directory has none.

    Raises:
        CheckpointError: All checkpoints are damaged, or one cannot be read.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(_folders(directory)):
        try:
            saved = SavedCheckpoint(folder, _verified(folder))
        except DamagedCheckpoint as error:
            damaged[folder] = str(error)
            continue
        for path, reason in damaged.items():
            print(
                f"tfdist: warning: the checkpoint {path} is damaged ({reason}) and is not "
                "used. The one before it is.",
                file=sys.stderr,
                flush=True,
            )
            renamed = path.with_name(f"{_DAMAGED}{path.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
        return saved
    reasons = [f"{folder.name}: {reason}" for folder, reason in damaged.items()]
    reasons += [f"{folder.name}, renamed before" for folder in directory.glob(f"{_DAMAGED}*")]
    if reasons:
        raise CheckpointError(
            f"One checkpoint in {str(directory)!r} must be whole. Received: {len(reasons)}, "
            f"all damaged ({'; '.join(reasons)}). Choose another directory to begin anew."
        )
    return None


def unfinished_folder(directory: Path, epoch: int, step: int, token: str) -> Path:
    """Returns the folder in which a checkpoint is written.

    Args:
        directory: The directory of the checkpoints.
        epoch: The epoch of the checkpoint.
        step: Number of completed steps of the epoch.
        token: A text that no other training has.
    """
    return directory / f"{_UNFINISHED}{_name(epoch, step)}-{token}"


def write(
    directory: Path,
    epoch: int,
    step: int,
    pieces: Sequence[Piece],
    state: Mapping[str, Any],
    keep: int,
    check: Callable[[], None] = lambda: None,
    token: str = "",
    of_others: Callable[[], Sequence[Shard]] = tuple,
    is_secret: bool = False,
) -> None:
    """Writes a checkpoint, completely or not at all, and removes old ones.

    Args:
        directory: The directory of the checkpoints.
        epoch: The epoch of the checkpoint.
        step: Number of completed steps of the epoch.
        pieces: The tensors.
        state: All other state, for JSON.
        keep: Number of checkpoints to keep, with this one.
        check: Raises an error if this training may no longer write there.
        token: As in `unfinished_folder`.
        of_others: Returns the shards of other processes, which are in that folder.
        is_secret: Whether no other user of the machine may read it.

    Raises:
        CheckpointError: The checkpoint could not be written.
    """
    name = _name(epoch, step)
    unfinished = unfinished_folder(directory, epoch, step, token or str(os.getpid()))
    try:
        make_folder(unfinished, is_secret)
        own = write_shard(unfinished, 0, pieces)
        digests = merge(unfinished, [shard for shard in (own, *of_others()) if shard])
        text = json.dumps(state, default=lambda number: number.item())
        (unfinished / _STATE).write_text(text)
        digests |= {file: digest_of(unfinished / file) for file in (INDEX, _STATE)}
        lines = [f"{digest}  {file}\n" for file, digest in sorted(digests.items())]
        (unfinished / _SUMS).write_text("".join(lines))
        # The rename is the commit: a folder with the final name is complete. So all files, and
        # the folder that lists them, must be on the disk before it. Otherwise a power failure
        # could leave the new name with empty files.
        for path in unfinished.iterdir():
            if is_secret:
                path.chmod(0o600)
            sync(path)
        sync(unfinished)
        final = directory / name
        check()
        if final.exists():
            # Training continued from an earlier checkpoint, and came to this step again. A
            # folder cannot replace a folder with files in one operation. Between both renames
            # this checkpoint is missing, and the one before it would be used.
            replaced = directory / f"{_UNFINISHED}replaced-{name}-{os.getpid()}"
            final.rename(replaced)
            unfinished.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            unfinished.rename(final)
        # Only now is the rename itself on the disk. Old checkpoints are removed after it.
        sync(directory)
    except CheckpointError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except (OSError, tf.errors.OpError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"A checkpoint must be written to {str(directory)!r}. Received: "
            f"{reason_of(error)}. The ones before it are still there: make room or mend the "
            "disk, and start again."
        ) from error
    for folder in _folders(directory)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def _name(epoch: int, step: int) -> str:
    return f"epoch-{epoch:05d}-step-{step:07d}"


def _folders(directory: Path) -> list[Path]:
    """Lists checkpoints in the order of training."""
    matches = [(_NAME.fullmatch(p.name), p) for p in directory.iterdir() if p.is_dir()]
    numbered = [((int(m[1]), int(m[2])), path) for m, path in matches if m is not None]
    return [path for _, path in sorted(numbered)]


def _verified(folder: Path) -> dict[str, Any]:
    """Reads the state of a checkpoint, and compares the checksums of all its files."""
    try:
        lines = [line.split("  ", 1) for line in (folder / _SUMS).read_text().splitlines()]
        if any(len(line) < 2 for line in lines):
            raise DamagedCheckpoint(f"{_SUMS} is cut off")
        expected = {name: digest for digest, name in lines}
        # Of the shards of all processes none may be missing.
        counts = {int(m[1]) for name in expected if (m := _DATA.fullmatch(name)) is not None}
        shards = {
            f"{TENSORS}.data-{shard:05d}-of-{count:05d}"
            for count in counts
            for shard in range(count)
        }
        missing = ({_STATE, INDEX} | shards) - expected.keys()
        if any("/" in name or name in (".", "..") for name in expected):
            raise DamagedCheckpoint(f"{_SUMS} lists files elsewhere")
        if missing:
            raise DamagedCheckpoint(f"{_SUMS} does not list {min(missing)}")
        for name, digest in expected.items():
            if digest_of(folder / name) != digest:
                raise DamagedCheckpoint(f"{name} has another checksum")
        content = (folder / _STATE).read_bytes()
        state = strict_json.loads(content, _MOST_STATE_BYTES, _MOST_DEPTH, allow_nan=True)
        if not isinstance(state, dict):
            raise DamagedCheckpoint(f"{_STATE} has no state of a training")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{Path(error.filename).name} is missing") from None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise DamagedCheckpoint(f"{Path(error.filename).name} is not a file") from None
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from None
    except OSError as error:
        raise CheckpointError(
            f"A checkpoint must be readable. Received: {error.filename or folder} "
            f"({error.strerror}). Mend that. To use the one before it, move this one away."
        ) from None
    return dict(state)
