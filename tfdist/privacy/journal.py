"""Steps are written down before they are made: a crash counts too many, never too few."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from tfdist.errors import CheckpointError
from tfdist.privacy.resumption import Earlier

NAME = "privacy.json"
_PARTS = 100  # of a training: how many steps are written down at once


class Journal:
    """A small file beside a backup: what all processes together have made at most.

    Args:
        directory: Where it is, or will be.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._path = Path(os.fspath(directory)).expanduser() / NAME

    def read(self) -> Earlier | None:
        """Gives what the process that wrote last, and those before it, may have made.

        Raises:
            CheckpointError: It is there, and cannot be read.
        """
        try:
            return Earlier.from_dict(json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                "The file that counts private steps must be whole, or how many were made is "
                f"not known. Received: {str(self._path)!r} ({error}). Begin anew in another "
                "directory, and pass what was spent as DPSGD(spent=...)."
            ) from None

    def write(self, made: Earlier) -> None:
        """Writes down what may have been made; it is on the disk when this returns.

        What another process has written stays: two may have begun in the same directory.

        Args:
            made: All steps, those to come of this process, its last run, included.

        Raises:
            CheckpointError: It cannot be written.
        """
        there = self.read()
        if there is not None:
            made = made.beside(there)
        new = self._path.with_name(f"{NAME}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("w") as file:
                json.dump(made.to_dict(), file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise CheckpointError(
                "The number of private steps must be written down before they are made. "
                f"Received: {str(self._path)!r} ({error.strerror}). Make room, or choose "
                "another directory."
            ) from error

    @property
    def is_there(self) -> bool:
        """Whether something was written, and was not deleted since."""
        return self._path.exists()


def steps_ahead(planned: int, at_once: int) -> int:
    """Says how many steps are written down at once.

    A hundredth of a training: so a crash counts that much too much at most, and the file is
    written some hundred times.

    Args:
        planned: Steps of the training.
        at_once: Steps of one execution.
    """
    return max(at_once, -(-planned // _PARTS))


def backup_of(callbacks: Any) -> Any:
    """Gives the directory of a `BackupAndRestore` among callbacks, or None.

    One that no file system has, such as `gs://...`, is left out.

    Args:
        callbacks: What `fit` was given.
    """
    import keras

    given = getattr(callbacks, "callbacks", callbacks)
    for callback in given if isinstance(given, list | tuple) else [given]:
        is_backup = isinstance(callback, keras.callbacks.BackupAndRestore)
        if is_backup and "://" not in os.fspath(callback.backup_dir):
            return callback.backup_dir
    return None
