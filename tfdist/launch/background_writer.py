"""Writes output in a thread, so that neither its reader nor its disk can hold up the launcher.

A terminal that is paused, `| less`, a log shipper that hangs or a network file system may keep
a write waiting for ever. A launcher that waits with it sees no death of a worker and no signal.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

STALLED_S = 5.0
"""A reader that takes nothing for this many seconds usually counts as stalled."""
_ROOM = 1 << 20
# More than the room is queued for what the launcher itself says, and for what ended workers
# had written. It has a limit too.
_MOST = 4 * _ROOM
# What a pipe takes at once: so a slow reader's progress is seen.
_PIECE = 4096


class BackgroundWriter:
    """Writes to a file descriptor, in a thread, through a queue of limited length.

    While the queue is full, the caller is to wait (`is_full`): a slow reader slows down those
    who write, as a pipe does. If the reader is stalled, what does not fit is dropped. The
    number of dropped lines is written in their place.

    Args:
        fd: The file descriptor; the writer keeps a copy of it.
        note: Returns the line to write in the place of dropped lines, from their number.
        on_error: Called in the thread when writing fails, for the first failure in a row. The
            lines count as dropped, and later ones are tried.
        stalled_s: Seconds after which a reader that takes nothing counts as stalled, by
            default `STALLED_S`.

    Attributes:
        is_broken: Whether the reader of a pipe is gone.
    """

    def __init__(
        self,
        fd: int,
        note: Callable[[int], str],
        on_error: Callable[[OSError], None] = lambda error: None,
        stalled_s: float | None = None,
    ) -> None:
        self.is_broken = False
        self._stalled_s = STALLED_S if stalled_s is None else stalled_s
        self._fd = os.dup(fd)
        self._note, self._on_error = note, on_error
        self._queue: deque[bytes] = deque()
        self._size = self._dropped = self._unwritable = 0
        self._at_line_start, self._is_finished = True, False
        self._progress_at = time.monotonic()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="tfdist-writer", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """Whether the caller is to wait before it writes more."""
        return self._size >= _ROOM and not self.is_stalled

    @property
    def is_stalled(self) -> bool:
        """Whether something waits to be written, and nothing was for a while."""
        return self._size > 0 and time.monotonic() - self._progress_at > self._stalled_s

    def write(self, data: bytes) -> None:
        """Queues data, or drops it if the reader is stalled. It never waits.

        Args:
            data: Whole lines.
        """
        with self._changed:
            if self.is_broken or self._is_finished or not data:
                return
            if self._size >= _MOST or (self._size >= _ROOM and self.is_stalled):
                self._dropped += data.count(b"\n")
                return
            self._note_dropped()
            self._put(data)

    def finish(self) -> None:
        """Says that nothing more will be written; the thread ends when all is written."""
        with self._changed:
            if not self._is_finished:
                self._note_dropped()
                self._is_finished = True
                self._changed.notify()

    def wait(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Finishes, and waits until all is written, as long as the reader takes something.

        Args:
            is_over: Whether to wait no more.

        Returns:
            Whether everything was written.
        """
        self.finish()
        while self._thread.is_alive() and not self.is_stalled and not is_over():
            self._thread.join(0.02)
        return not self._thread.is_alive()

    def _note_dropped(self) -> None:
        if self._dropped:
            self._put(self._line(self._dropped))
            self._dropped = 0

    def _put(self, data: bytes) -> None:
        if not self._size:
            self._progress_at = time.monotonic()
        self._queue.append(data)
        self._size += len(data)
        self._changed.notify()

    def _line(self, count: int) -> bytes:
        return f"{self._note(count)}\n".encode(errors="replace")

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._is_finished:
                    self._changed.wait()
                if not self._queue:
                    break
                data = self._queue.popleft()
            self._write(data)
            with self._changed:
                self._size -= len(data)
                self._progress_at = time.monotonic()
                if self.is_broken:
                    self._queue.clear()
                    self._size, self._is_finished = 0, True
        with suppress(OSError):
            os.close(self._fd)

    def _write(self, data: bytes) -> None:
        try:
            if self._unwritable:
                line = self._line(self._unwritable)
                self._write_all(line if self._at_line_start else b"\n" + line)
                self._unwritable = 0
            self._write_all(data)
        except BrokenPipeError:
            self.is_broken = True
        except OSError as error:  # a full disk, a terminal that is gone
            if not self._unwritable:
                self._on_error(error)
            self._unwritable += max(1, data.count(b"\n"))

    def _write_all(self, data: bytes) -> None:
        offset = 0
        while offset < len(data):
            try:
                written = os.write(self._fd, data[offset : offset + _PIECE])
            except BlockingIOError:  # another program has set the pipe so
                select.select([], [self._fd], [], 0.2)
                continue
            offset += written
            self._at_line_start = data[offset - 1 : offset] == b"\n"
            self._progress_at = time.monotonic()
