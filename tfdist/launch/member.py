"""One started worker: what it writes, and whether it lives."""

from __future__ import annotations

import os
import subprocess

from tfdist.cluster.heartbeat import Heartbeat
from tfdist.launch.hidden_output import HiddenOutput
from tfdist.launch.output import Lines
from tfdist.launch.worker import Worker


class Member:
    """One started worker."""

    def __init__(
        self,
        position: int,
        worker: Worker,
        process: subprocess.Popen[bytes],
        fd: int,
        lines: Lines,
        is_live: bool,
        note: Heartbeat,
        hidden_output: HiddenOutput | None,
    ) -> None:
        self.position = position
        self.worker = worker
        self.process = process
        self.fd: int | None = fd
        self.lines = lines
        self.is_live = is_live
        self.note = note
        self.hidden_output = hidden_output
        self.ended_at: float | None = None
        self.has_group = True

    def signal_group(self, number: int) -> None:
        """Signals the worker and its children, and notes when none of them is left."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            self.has_group = False
        except PermissionError:
            # macOS answers so for a group of which only zombies are left.
            self.has_group = self.ended_at is None
