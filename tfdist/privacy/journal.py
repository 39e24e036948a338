"""A file of private steps, written before they are made.

After a crash the file may count too many steps, but never too few.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from tfdist.errors import CheckpointError
from tfdist.privacy.resumption import Earlier
from tfdist.training import callback_kinds

NAME = "privacy.json"
_PARTS = 100  # a training's steps are written in about so many parts


class SpendingJournal:
    """A small file beside a backup, with all steps that any process may have made.

    Args:
        directory: The directory of the file. It need not exist.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._path = Path(os.fspath(directory)).expanduser() / NAME

    def read(self) -> Earlier | None:
        """Returns all steps that earlier processes may have made, or None without a file.

        Raises:
            CheckpointError: The file cannot be read.
        """
        try:
            return Earlier.from_dict(json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                "The file that counts private steps must be readable: without it, their number "
                f"is unknown. Received: {str(self._path)!r} ({error}). Start again in another "
                "directory, and pass the ledger of the earlier steps as DPSGD(spent=...)."
            ) from None

    def write(self, record: Earlier) -> None:
        """Writes steps to the disk, before they are made.

        The steps of another process stay in the file, since two processes may have begun in the
        same directory.

        Args:
            record: All steps, with the coming steps of this process as its last run.

        Raises:
            CheckpointError: The file cannot be written.
        """
        other_record = self.read()
        if other_record is not None:
            record = record.beside(other_record)
        # A new file replaces the old one in one operation, so a crash never leaves half a file.
        temporary = self._path.with_name(f"{NAME}.{os.getpid()}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The noise of correlated steps follows from a secret that the file keeps.
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "w") as file:
                os.fchmod(fd, 0o600)
                json.dump(record.to_dict(), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise CheckpointError(
                "The number of private steps must be written to disk before the steps. "
                f"Received: {str(self._path)!r} ({error.strerror}). Free some space, or choose "
                "another directory."
            ) from error

    @property
    def is_there(self) -> bool:
        """Whether the file exists."""
        return self._path.exists()


def steps_ahead(planned_steps: int, at_once: int) -> int:
    """Returns how many coming steps are written at once.

    It is a hundredth of a training. So a crash counts at most 1 % of the steps too many, and
    the file is written about a hundred times.

    Args:
        planned_steps: The planned steps of the training.
        at_once: The steps of one execution.
    """
    return max(at_once, -(-planned_steps // _PARTS))


def backup_of(callbacks: Any) -> Any:
    """Returns the directory of a `BackupAndRestore` among callbacks, or None.

    Directories outside of the file system, such as `gs://...`, are left out.

    Args:
        callbacks: The argument `callbacks` of `fit`.
    """
    for callback in callback_kinds.listed(callbacks):
        is_backup = callback_kinds.backs_up(callback)
        if is_backup and "://" not in os.fspath(callback.backup_dir):
            return callback.backup_dir
    return None
