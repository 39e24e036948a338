"""The files of `--log-dir`: the whole output of each worker, a file for each of its starts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from tfdist.errors import LaunchError
from tfdist.launch.background_writer import BackgroundWriter
from tfdist.launch.worker import Worker


class LogFile:
    """The output of one start of a worker. A full or slow disk does not hold up the launcher.

    Args:
        path: The file.
        is_appended: Whether to keep what is there.
        note: The line for lines that could not be written, from their number.

    Attributes:
        path: The file.

    Raises:
        OSError: The file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        is_appended: bool = False,
        note: Callable[[int], str] = "tfdist: {} lines are missing here.".format,
    ) -> None:
        self.path = path
        self._problem: str | None = None
        mode = os.O_APPEND if is_appended else os.O_TRUNC
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o666)
        try:
            self._writer = BackgroundWriter(fd, note, self._note_problem)
        finally:
            os.close(fd)

    @property
    def is_full(self) -> bool:
        """Whether to write no more for a moment."""
        return self._writer.is_full

    def write(self, data: bytes) -> None:
        """Queues output.

        Args:
            data: Some bytes.
        """
        self._writer.write(data)

    def close(self) -> None:
        """Ends the file, once all is written; it does not wait for that."""
        self._writer.finish()

    def wait(self) -> None:
        """Waits until all is written, as long as the disk takes something."""
        self._writer.wait()

    def take_problem(self) -> str | None:
        """Returns a line for the user if the file could not be written, once."""
        problem, self._problem = self._problem, None
        return problem

    def _note_problem(self, error: OSError) -> None:
        self._problem = (
            f"tfdist: warning: {str(self.path)!r} cannot be written ({error.strerror}). "
            "Training goes on, and the file lacks lines."
        )


class LogFolder:
    """The folder of the log files, and those that are open.

    Args:
        path: The folder, which is made if it is not there; None for no log files.

    Raises:
        LaunchError: It cannot be made.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._open: dict[int, LogFile] = {}
        try:
            if path is not None:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error) from None

    @property
    def is_full(self) -> bool:
        """Whether to write no more for a moment, since a disk is slow."""
        return any(log.is_full for log in self._open.values())

    def open(self, position: int, worker: Worker) -> LogFile | None:
        """Makes the log file of a worker that is about to start.

        The file of its last start keeps its content under the name of that attempt, so
        `worker-0.log` is always the present one.

        Args:
            position: The worker's position among those of this machine.
            worker: The worker.

        Raises:
            LaunchError: The file cannot be written.
        """
        if self._path is None:
            return None
        file = self._path / worker.log_name
        try:
            if file.exists():
                number = self._attempts(file) + 1
                file.rename(file.with_name(f"{file.stem}.attempt-{number}.log"))
            self._open[position] = LogFile(file)
        except OSError as error:
            raise self._refusal(error) from None
        return self._open[position]

    def take_problems(self) -> list[tuple[int, str]]:
        """Returns new problems of log files: the worker's position, a line for the user."""
        problems = [(position, log.take_problem()) for position, log in self._open.items()]
        return [(position, problem) for position, problem in problems if problem is not None]

    def close(self) -> None:
        """Ends all files, and waits until they are written, unless a disk is stuck."""
        for log in self._open.values():
            log.close()
        for log in self._open.values():
            log.wait()

    def _attempts(self, file: Path) -> int:
        """Returns the number of the last attempt whose file was kept."""
        pattern = re.compile(re.escape(file.stem) + r"\.attempt-(\d{1,9})\.log")
        matches = map(pattern.fullmatch, (path.name for path in file.parent.iterdir()))
        return max((int(match[1]) for match in matches if match), default=0)

    def _refusal(self, error: OSError) -> LaunchError:
        return LaunchError(
            "`--log-dir` must be a folder that can be written. "
            f"Received: --log-dir={str(self._path)!r} ({error.strerror}). "
            "Choose another folder."
        )
