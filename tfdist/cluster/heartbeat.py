"""The heartbeat of a worker: a few numbers in memory that the worker and its launcher share.

A write is a store into memory, so a worker can record every step. The launcher can still
read the numbers after a kill -9.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

HEARTBEAT_FD = "TFDIST_HEARTBEAT_FD"

# Written by the worker: the process's steps, the epoch, its steps in that epoch, and flags.
_PROGRESS = struct.Struct("<4Q")
# Also by the worker: the number after that of a worker that does not answer, or 0; and what the
# script has set as the limit of a hang, in seconds, less than 0 for none, and 0 if nothing.
_LOST = struct.Struct("<Q")
_LOST_OFFSET = 32
_LIMIT = struct.Struct("<d")
_LIMIT_OFFSET = 40
# When the worker's process last did anything, by `time.monotonic()`; 0 if it does not tell.
_BEAT = struct.Struct("<d")
_BEAT_OFFSET = 56
_BEAT_S = 1.0
# Written by the launcher, at this byte: whether SIGTERM ends the worker without saving.
_MUST_END_OFFSET = 48
_SIZE = 64
_SAVES, _PREEMPTED = 1, 2


@dataclass(frozen=True)
class WorkerProgress:
    """How far a worker is.

    Attributes:
        steps_made: Training steps that the process has made; 0 before the first.
        epoch: The epoch of the last step, from 0.
        step: Steps that it has made in that epoch.
        saves: Whether it saves its training when SIGTERM ends it.
        preempted: Whether SIGTERM came and the training is saved.
        lost: The number of a worker that does not answer, in a run that hangs.
    """

    steps_made: int = 0
    epoch: int = 0
    step: int = 0
    saves: bool = False
    preempted: bool = False
    lost: int | None = None

    @property
    def where(self) -> str:
        """The position in words."""
        if not self.steps_made:
            return "before its first step"
        return f"after step {self.step} of epoch {self.epoch + 1}"


class Heartbeat:
    """The shared memory. Without a launcher only this process sees it.

    Args:
        content: A buffer of `_SIZE` bytes.
    """

    def __init__(self, content: Any = None) -> None:
        self._content = bytearray(_SIZE) if content is None else content
        self._flags = 0
        self._steps_made = self._epoch = self._step = 0

    @classmethod
    def of(cls, fd: int) -> Heartbeat:
        """Maps the memory behind a file descriptor, and closes the descriptor.

        Args:
            fd: From `shared_memory`.
        """
        try:
            return cls(mmap.mmap(fd, _SIZE))
        finally:
            os.close(fd)

    # --- the worker's side --------------------------------------------------------------

    def record_steps(self, epoch: int, step: int, steps: int) -> None:
        """Records training steps.

        Args:
            epoch: The epoch, from 0.
            step: Steps made in this epoch so far.
            steps: Steps made since the last call.
        """
        self._steps_made, self._epoch, self._step = self._steps_made + steps, epoch, step
        self._write()

    def set_flags(self, *, saves: bool = False, preempted: bool = False) -> None:
        """Returns what SIGTERM does, or has done.

        Args:
            saves: Whether SIGTERM makes the worker save its training.
            preempted: Whether SIGTERM came and the training is saved.
        """
        self._flags = _SAVES * saves | _PREEMPTED * preempted
        self._write()

    def record_lost(self, worker: int) -> None:
        """Records that a worker does not answer, before this process ends for that reason.

        Args:
            worker: The worker's number.
        """
        _LOST.pack_into(self._content, _LOST_OFFSET, worker + 1)

    def record_hang_limit(self, seconds: float) -> None:
        """Records the limit of a hang that the script has set.

        Args:
            seconds: The limit; 0 if hangs are not to end the run.
        """
        _LIMIT.pack_into(self._content, _LIMIT_OFFSET, seconds or -1.0)

    def beat(self) -> None:
        """Records that this process is alive."""
        _BEAT.pack_into(self._content, _BEAT_OFFSET, time.monotonic())

    @property
    def must_end(self) -> bool:
        """Whether the worker must end at once, without saving."""
        return bool(self._content[_MUST_END_OFFSET])

    def _write(self) -> None:
        _PROGRESS.pack_into(
            self._content, 0, self._steps_made, self._epoch, self._step, self._flags
        )

    # --- the launcher's side ------------------------------------------------------------

    def read(self) -> WorkerProgress:
        """Returns the progress that the worker has recorded."""
        steps_made, epoch, step, flags = _PROGRESS.unpack_from(self._content, 0)
        (lost,) = _LOST.unpack_from(self._content, _LOST_OFFSET)
        return WorkerProgress(
            steps_made,
            epoch,
            step,
            bool(flags & _SAVES),
            bool(flags & _PREEMPTED),
            lost - 1 if lost else None,
        )

    @property
    def last_beat(self) -> float | None:
        """When the process last recorded that it is alive; None if it never has."""
        (at,) = _BEAT.unpack_from(self._content, _BEAT_OFFSET)
        return float(at) or None

    def hang_limit(self, default: float) -> float:
        """Returns the limit of a hang, in seconds; 0 if hangs are not to end the run.

        Args:
            default: The limit if the script has set none.
        """
        (seconds,) = _LIMIT.unpack_from(self._content, _LIMIT_OFFSET)
        return max(0.0, seconds) if seconds else default

    def ask_for_end(self) -> None:
        """Lets the next SIGTERM end the worker at once."""
        self._content[_MUST_END_OFFSET] = 1


here = Heartbeat()
"""The heartbeat of this process."""


def shared_memory() -> int:
    """Makes the memory of a heartbeat, and returns its file descriptor."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tfdist-heartbeat")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.write(fd, bytes(_SIZE))
    return fd


def share_with_launcher() -> None:
    """Lets this process's launcher read `here`, if a launcher started the process."""
    global here
    fd_text = os.environ.pop(HEARTBEAT_FD, None)
    if fd_text is not None:
        here = Heartbeat.of(int(fd_text))
        threading.Thread(target=_beat, args=(here,), name="tfdist-beat", daemon=True).start()


def _beat(heartbeat: Heartbeat) -> None:
    while True:
        heartbeat.beat()
        time.sleep(_BEAT_S)
