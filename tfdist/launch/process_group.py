"""The started workers: what they write, which have ended, and how to end them all."""

from __future__ import annotations

import os
import pty
import selectors
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tfdist.cluster.heartbeat import NOTE_FD, Heartbeat, Told, shared_memory
from tfdist.errors import LaunchError
from tfdist.launch.cause import Failure
from tfdist.launch.hidden_output import HiddenOutput, leader
from tfdist.launch.member import Member
from tfdist.launch.output import Lines, Screen
from tfdist.launch.worker import Worker
from tfdist.watchdog.memory import state_of
from tfdist.watchdog.settings import HANG_LIMIT, Settings

LAUNCHER_FD = "TFDIST_LAUNCHER_FD"

_POLL_S = 0.05
# How long the children of a worker that has ended may take to end by themselves.
_CHILDREN_S = 2.0


class ProcessGroup:
    """The workers of this machine while they run.

    Attributes:
        failures: The workers that failed, in the order in which they ended.
        finished: The tasks that ended well.
    """

    def __init__(self, screen: Screen, shows_all: bool = True) -> None:
        """Starts with no worker.

        Args:
            screen: Where their lines go.
            shows_all: Whether those of all workers do; else the leader's, and of others what
                tfdist says itself and what one that fails has written.
        """
        self.failures: list[Failure] = []
        self.finished: list[str] = []
        self._screen = screen
        self._shows_all = shows_all
        self._leader = 0
        self._has_said_what_is_shown = False
        self._log_dir: Path | None = None
        self._members: list[Member] = []
        self._selector = selectors.DefaultSelector()
        self._stopped_since: float | None = None
        # Workers hold the reading end: it reports the end of file when the launcher dies.
        self._lifeline, self._launcher_end = os.pipe()

    @property
    def is_done(self) -> bool:
        """Whether only processes are left that serve one of this machine that ended well."""
        driving = [m.worker for m in self._members if not m.worker.serves]
        return 0 < len(driving) < len(self._members) and all(
            worker.task in self.finished for worker in driving
        )

    @property
    def is_running(self) -> bool:
        """Whether a worker or a child of one is left."""
        return any(member.has_group for member in self._members)

    @property
    def told(self) -> Told:
        """How far the first worker of this machine is that does not only serve."""
        driving = [m for m in self._members if not m.worker.serves]
        return driving[0].note.read() if driving else Told()

    @property
    def saves(self) -> bool:
        """Whether a worker that runs will save what it has when SIGTERM comes."""
        return any(m.ended_at is None and m.note.read().saves for m in self._members)

    def start(self, workers: Sequence[Worker], log_dir: Path | None) -> None:
        """Starts the workers.

        Args:
            workers: Which.
            log_dir: A folder for each worker's whole output.

        Raises:
            LaunchError: A worker could not be started or a log file not be written.
        """
        self._log_dir = log_dir
        self._leader = leader(workers)
        for position, worker in enumerate(workers):
            self._members.append(self._started(position, worker))

    def start_again(self, failure: Failure) -> int:
        """Starts a worker that failed anew, in its place.

        Args:
            failure: The worker's; it is no failure of the run then.

        Returns:
            Its position among those started.
        """
        self.failures.remove(failure)
        (position,) = (i for i, m in enumerate(self._members) if m.worker == failure.worker)
        self._members[position].signal_group(signal.SIGKILL)
        self._members[position] = self._started(position, failure.worker, again=True)
        return position

    def rename(self, tasks: Sequence[str]) -> None:
        """Shows the workers under other names.

        Args:
            tasks: The names.
        """
        self._screen.name(tasks)

    def say(self, position: int, line: str) -> None:
        """Shows a line of the launcher's own beside a worker's.

        Args:
            position: The worker's among those started.
            line: The line.
        """
        self._screen.show(position, [line])

    def reveal(self, failures: Sequence[Failure], cause: Failure | None = None) -> None:
        """Shows what failed workers wrote, where it was hidden_output until now.

        Args:
            failures: Theirs. Of one that only lost a peer a line says enough.
            cause: The failure that is shown in any case.
        """
        leader = self._members[self._leader].worker
        seen = {f.last_error for f in self.failures if f.worker == leader} - {""}
        for failure in failures:
            (member,) = (m for m in self._members if m.worker == failure.worker)
            if member.hidden_output is None:
                continue
            lines = member.hidden_output.release()
            if failure.last_error in seen:
                lines = [f"tfdist: it failed as {leader.task} did. {failure.last_error}"]
            elif failure.blames_peer and failure is not cause:
                lines = [f"tfdist: it lost another worker. {failure.last_error}"]
            self._screen.show(member.position, lines)

    def _started(self, position: int, worker: Worker, again: bool = False) -> Member:
        log = None
        log_dir = self._log_dir
        try:
            if log_dir is not None:
                log_dir.mkdir(parents=True, exist_ok=True)
                log = (log_dir / worker.log_name).open("ab" if again else "wb")
        except OSError as error:
            raise LaunchError(
                "`--log-dir` must be a folder that can be written. "
                f"Received: --log-dir={str(log_dir)!r} ({error.strerror}). "
                "Choose another folder."
            ) from None
        # Only the chief draws a progress bar, and only on a terminal is it of use.
        is_live = self._screen.is_terminal and worker.shows_progress
        reading, writing = _terminal(self._screen) if is_live else os.pipe()
        memory = shared_memory()
        try:
            process = subprocess.Popen(
                worker.command,
                env={
                    **worker.environment,
                    LAUNCHER_FD: str(self._lifeline),
                    NOTE_FD: str(memory),
                },
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                pass_fds=(self._lifeline, memory),
                start_new_session=True,
            )
        except OSError as error:
            os.close(reading)
            os.close(memory)
            raise LaunchError(
                f"The program of {worker.task} must be one that can be started. "
                f"Received: {worker.command[0]!r} ({error.strerror}). "
                "Check that it exists and may be run."
            ) from None
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        lines = Lines(log, worker.is_quiet)
        note = Heartbeat.of(memory)
        is_shown = self._shows_all or position == self._leader
        hidden_output = None if is_shown else HiddenOutput()
        member = Member(position, worker, process, reading, lines, is_live, note, hidden_output)
        self._selector.register(reading, selectors.EVENT_READ, member)
        return member

    def pump(self, wait: float = _POLL_S) -> None:
        """Passes on what was written, and notes which workers have ended.

        Args:
            wait: For how many seconds at most, where nothing happens.
        """
        if self._selector.get_map():
            for key, _ in self._selector.select(wait):
                self._read(key.data)
        else:
            time.sleep(wait)
        now = time.monotonic()
        for member in self._members:
            if member.ended_at is None and member.process.poll() is not None:
                member.ended_at = now
                self._drain(member)
                self._note_end(member)
            if member.ended_at is not None and member.has_group:
                overdue = now - member.ended_at > _CHILDREN_S
                member.signal_group(signal.SIGKILL if overdue else 0)
                if overdue:
                    # What is left of the group can only be waiting to be reaped.
                    member.has_group = False

    def ask(self, number: int, grace: float, received: Sequence[int]) -> None:
        """Sends a signal to the workers that drive the run, and waits until they have ended.

        Args:
            number: The signal.
            grace: For how many seconds at most.
            received: The signals sent to the launcher; a further one ends the wait.
        """
        asked = len(received)
        driving = [m for m in self._members if not m.worker.serves]
        for member in driving:
            if member.ended_at is None:
                member.signal_group(number)
        deadline = time.monotonic() + grace
        while (
            any(member.ended_at is None for member in driving)
            and time.monotonic() < deadline
            and len(received) == asked
        ):
            self.pump()

    def end_stopped(self) -> None:
        """Kills workers that are stopped once all others have ended: nobody else notices them.

        While others run, their watchers do; a run of one worker may be paused.
        """
        left = [m for m in self._members if m.ended_at is None]
        is_left_alone = 0 < len(left) < len(self._members)
        if not is_left_alone or any(state_of(m.process.pid) != "T" for m in left):
            self._stopped_since = None
            return
        now = time.monotonic()
        self._stopped_since = self._stopped_since or now
        limit = Settings.from_environment(left[0].worker.environment).limit
        if not limit or now - self._stopped_since < limit:
            return
        for member in left:
            self.say(
                member.position,
                f"tfdist: {member.worker.task} is stopped (SIGSTOP), and all others have "
                f"ended. After {limit:g} s ({HANG_LIMIT}) it is killed.",
            )
            member.signal_group(signal.SIGKILL)

    def end(self, steps: Sequence[tuple[int, float]], received: Sequence[int] = ()) -> None:
        """Ends all workers and their children.

        Args:
            steps: One signal after another, each with the seconds it has to take effect.
            received: The signals sent to the launcher; a further one cuts the rest short.
        """
        asked = len(received)
        for number, grace in steps:
            for member in self._members:
                if member.has_group:
                    member.note.ask_for_end()
                    member.signal_group(number)
            deadline = time.monotonic() + grace
            while self.is_running and time.monotonic() < deadline:
                # A second Ctrl-C will not wait for the first.
                if len(received) > asked and number != signal.SIGKILL:
                    return self.end(((signal.SIGKILL, 5.0),))
                self.pump()
        return None

    def close(self) -> None:
        """Kills whatever is left and gives back what was opened."""
        for member in self._members:
            if member.has_group:
                member.signal_group(signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                member.process.wait(timeout=5.0)
            if member.fd is not None:
                os.close(member.fd)
        self._selector.close()
        os.close(self._launcher_end)
        os.close(self._lifeline)
        with suppress(BrokenPipeError):
            self._screen.close()

    def _note_end(self, member: Member) -> None:
        if member.process.returncode == 0:
            self.finished.append(member.worker.task)
            return
        lines = tuple(member.lines.last)
        told = self.told if member.worker.serves else member.note.read()
        self.failures.append(
            Failure(member.worker, member.process.returncode, lines, told, time.time())
        )

    def _read(self, member: Member) -> bool:
        """Reads once; returns whether there may be more."""
        if member.fd is None:
            return False
        try:
            data = os.read(member.fd, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            # Linux's answer on a terminal that the last writer has closed.
            data = b""
        if not data:
            self._selector.unregister(member.fd)
            os.close(member.fd)
            member.fd = None
            return False
        lines = member.lines.feed(data)
        live = member.lines.unfinished if member.is_live else None
        self._screen.show(member.position, self._shown(member, lines), live)
        return True

    def _shown(self, member: Member, lines: list[str]) -> list[str]:
        if member.hidden_output is None:
            return lines
        shown = member.hidden_output.take(lines)
        if len(shown) < len(lines) and not self._has_said_what_is_shown:
            self._has_said_what_is_shown = True
            task = self._members[self._leader].worker.task
            shown.insert(
                0,
                f"tfdist: only what {task} writes is shown, and what others write if they "
                "fail. --output all shows all.",
            )
        return shown

    def _drain(self, member: Member) -> None:
        while self._read(member):
            pass
        rest = self._shown(member, member.lines.finish())
        self._screen.show(member.position, rest, "" if member.is_live else None)


def _terminal(screen: Screen) -> tuple[int, int]:
    """Opens a terminal as wide as the room beside the prefix."""
    outer, inner = pty.openpty()
    settings = termios.tcgetattr(inner)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(inner, termios.TCSANOW, settings)
    with suppress(OSError):
        rows, columns = termios.tcgetwinsize(sys.stdout.fileno())
        termios.tcsetwinsize(inner, (rows, max(20, columns - screen.prefix_width)))
    return outer, inner
