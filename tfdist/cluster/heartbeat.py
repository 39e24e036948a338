"""What a worker and its launcher tell each other: a few numbers in memory that both map.

Writing them is a store into memory, so a worker notes every step; they are there for the
launcher after a kill -9 too.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from typing import Any

NOTE_FD = "TFDIST_NOTE_FD"

# Written by the worker: steps made by the process, the epoch, steps made of it, and flags.
_TOLD = struct.Struct("<4Q")
# Written by the launcher: whether SIGTERM asks for the end alone.
_MUST_END = 48
_SIZE = 64
_SAVES, _PREEMPTED = 1, 2


@dataclass(frozen=True)
class Told:
    """How far a worker is.

    Attributes:
        made: Training steps that the process has made; 0 before the first.
        epoch: Of the last one, from 0.
        step: Steps made of that epoch.
        saves: Whether it saves its training when SIGTERM ends it.
        preempted: Whether it has done so.
    """

    made: int = 0
    epoch: int = 0
    step: int = 0
    saves: bool = False
    preempted: bool = False

    @property
    def where(self) -> str:
        """In words."""
        if not self.made:
            return "before its first step"
        return f"after step {self.step} of epoch {self.epoch + 1}"


class Heartbeat:
    """The memory; without a launcher nobody else sees it.

    Args:
        content: Of `_SIZE` bytes.
    """

    def __init__(self, content: Any = None) -> None:
        self._content = bytearray(_SIZE) if content is None else content
        self._flags = 0
        self._made = self._epoch = self._step = 0

    @classmethod
    def of(cls, fd: int) -> Heartbeat:
        """Maps what a file descriptor stands for, and closes that.

        Args:
            fd: From `shared_memory`.
        """
        try:
            return cls(mmap.mmap(fd, _SIZE))
        finally:
            os.close(fd)

    # --- the worker's side --------------------------------------------------------------

    def tell(self, epoch: int, step: int, steps: int) -> None:
        """Notes that steps were made.

        Args:
            epoch: From 0.
            step: Steps made of it.
            steps: How many were made just now.
        """
        self._made, self._epoch, self._step = self._made + steps, epoch, step
        self._write()

    def mark(self, *, saves: bool = False, preempted: bool = False) -> None:
        """Notes what SIGTERM does, or has done.

        Args:
            saves: Whether it saves the training.
            preempted: Whether that was saved.
        """
        self._flags = _SAVES * saves | _PREEMPTED * preempted
        self._write()

    @property
    def must_end(self) -> bool:
        """Whether the launcher wants the end at once, with nothing saved."""
        return bool(self._content[_MUST_END])

    def _write(self) -> None:
        _TOLD.pack_into(self._content, 0, self._made, self._epoch, self._step, self._flags)

    # --- the launcher's side ------------------------------------------------------------

    def read(self) -> Told:
        """Gives what the worker has told."""
        made, epoch, step, flags = _TOLD.unpack_from(self._content, 0)
        return Told(made, epoch, step, bool(flags & _SAVES), bool(flags & _PREEMPTED))

    def ask_for_end(self) -> None:
        """Lets the next SIGTERM end the worker at once."""
        self._content[_MUST_END] = 1


here = Heartbeat()
"""This process's."""


def shared_memory() -> int:
    """Makes memory for a note, and gives a file descriptor that stands for it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tfdist-note")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.write(fd, bytes(_SIZE))
    return fd


def share_with_launcher() -> None:
    """Makes `here` the note that this process's launcher reads, if a launcher started it."""
    global here
    text = os.environ.pop(NOTE_FD, None)
    if text is not None:
        here = Heartbeat.of(int(text))
