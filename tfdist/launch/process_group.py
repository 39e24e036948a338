"""The started workers: shows their output, watches for their end, and can end them all."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tfdist.cluster.heartbeat import WorkerProgress
from tfdist.launch.cause import Failure
from tfdist.launch.detached import RunName, end_detached
from tfdist.launch.hidden_output import HiddenOutput, ShownErrors, Shows, explain_hiding, leader
from tfdist.launch.journal import Journal, state_of_worker
from tfdist.launch.logs import LogFolder
from tfdist.launch.member import StartedWorker, start_member
from tfdist.launch.output import Screen
from tfdist.launch.resources import killed_for_memory
from tfdist.launch.restarts import RestartCause
from tfdist.launch.stopped import StoppedWorkers
from tfdist.launch.worker import Worker

_POLL_S = 0.05
# While the reader of the output is slower than the workers, which wait for it.
_FULL_POLL_S = 0.005
_NOTED_EVERY_S = 0.5
# The children of a worker that has ended get this many seconds to end by themselves.
_CHILDREN_S = 2.0


class ProcessGroup:
    """The workers of this machine while they run.

    Attributes:
        failures: The failures of workers, in the order in which the workers ended.
        finished: The tasks that ended with exit status 0.
    """

    def __init__(
        self, screen: Screen, shows: Shows = "all", journal: Journal | None = None
    ) -> None:
        """Starts with no worker.

        Args:
            screen: Shows the workers' lines.
            journal: Gets starts and failures, and the state of the workers.
            shows: Whose lines to show. Of the other workers tfdist's own lines are shown, and
                all lines of a worker that fails.
        """
        self.failures: list[Failure] = []
        self.finished: list[str] = []
        self._screen, self._shows = screen, shows
        self._journal, self._noted_at = journal or Journal(), 0.0
        self._leader, self._logs, self._run_name = 0, LogFolder(), RunName.new()
        self._shown_errors = ShownErrors()
        self._members: list[StartedWorker] = []
        self._selector = selectors.DefaultSelector()
        self._stopped, self._killed_before = StoppedWorkers(), killed_for_memory()
        # Workers have the reading end: it reports the end of the file when the launcher dies.
        self._lifeline, self._launcher_end = os.pipe()

    @property
    def is_done(self) -> bool:
        """Whether all workers that drive the run ended well and only servers are left.

        A run on this machine with parameter servers ends when its chief has ended.
        """
        driving = [m.worker for m in self._members if not m.worker.serves]
        return 0 < len(driving) < len(self._members) and all(
            worker.task in self.finished for worker in driving
        )

    @property
    def is_running(self) -> bool:
        """Whether a worker or a child process of a worker is left."""
        return any(member.has_group for member in self._members)

    @property
    def progress(self) -> WorkerProgress:
        """The progress of this machine's first worker that drives the run."""
        driving = [m for m in self._members if not m.worker.serves]
        return driving[0].heartbeat.read() if driving else WorkerProgress()

    @property
    def saves(self) -> bool:
        """Whether a running worker will save its training when SIGTERM comes."""
        return any(m.ended_at is None and m.heartbeat.read().saves for m in self._members)

    def start(self, workers: Sequence[Worker], log_dir: Path | None) -> None:
        """Starts the workers.

        Args:
            workers: The workers to start.
            log_dir: A folder for the log files, one a worker, with its whole output.

        Raises:
            LaunchError: A worker could not be started, or a log file could not be written.
        """
        self._logs = LogFolder(log_dir)
        self._leader = leader(workers)
        for position, worker in enumerate(workers):
            self._members.append(self._start(position, worker))
        self._journal.note_start(map(state_of_worker, self._members))

    def start_again(self, failure: Failure) -> int:
        """Starts a failed worker again, in its place.

        Args:
            failure: The worker's failure; it no longer counts as a failure of the run.

        Returns:
            The worker's position among the started workers.
        """
        self.failures.remove(failure)
        (position,) = (i for i, m in enumerate(self._members) if m.worker == failure.worker)
        self._members[position].signal_group(signal.SIGKILL)
        self._members[position] = self._start(position, failure.worker)
        self._journal.note_restart(RestartCause.of(failure), [failure.worker.task])
        self._journal.note_start([state_of_worker(self._members[position])])
        return position

    def check_reader(self) -> None:
        """Raises BrokenPipeError if the reader of the output is gone, as after `| head`."""
        self._screen.check()

    def rename(self, tasks: Sequence[str]) -> None:
        """Shows the workers under other names."""
        self._screen.name(tasks)

    def say(self, position: int, line: str) -> None:
        """Shows a line of the launcher with a worker's prefix.

        Args:
            position: The worker's position among the started workers.
            line: The line.
        """
        self._screen.show(position, [line])

    def reveal(self, failures: Sequence[Failure], cause: Failure | None = None) -> None:
        """Shows the output of failed workers that was hidden until now.

        Args:
            failures: Their failures. A worker that only lost a peer gets one line.
            cause: The failure whose output is shown in any case.
        """
        for failure in self.failures:
            if self._member_of(failure).hidden_output is None:
                self._shown_errors.note(failure)
        for failure in failures:
            member = self._member_of(failure)
            if member.hidden_output is None:
                continue
            lines = member.hidden_output.release()
            lines = self._shown_errors.shorten(lines, failure, is_cause=failure is cause)
            self._screen.show(member.position, lines)

    def _member_of(self, failure: Failure) -> StartedWorker:
        return next(m for m in self._members if m.worker == failure.worker)

    def _start(self, position: int, worker: Worker) -> StartedWorker:
        is_shown = self._shows == "all" or (self._shows == "chief" and position == self._leader)
        member = start_member(
            position,
            worker,
            self._screen,
            self._lifeline,
            self._run_name,
            log=self._logs.open(position, worker),
            hidden_output=None if is_shown else HiddenOutput(),
        )
        assert member.fd is not None
        self._selector.register(member.fd, selectors.EVENT_READ, member)
        return member

    def pump(self, wait: float = _POLL_S) -> None:
        """Shows new output, and records which workers have ended.

        Args:
            wait: Seconds to wait at most if nothing happens.
        """
        self._tell_log_problems()
        if self._screen.is_full or self._logs.is_full:
            time.sleep(min(wait, _FULL_POLL_S))
        elif self._selector.get_map():
            for key, _ in self._selector.select(wait):
                self._read(key.data)
        else:
            time.sleep(wait)
        now = time.monotonic()
        self._note_state(now)
        for member in self._members:
            if member.ended_at is None and member.process.poll() is not None:
                member.ended_at = now
                self._drain(member)
                self._record_end(member)
            if member.ended_at is not None and member.has_group:
                overdue = now - member.ended_at > _CHILDREN_S
                member.signal_group(signal.SIGKILL if overdue else 0)
                if overdue:
                    # After SIGKILL, only zombies can be left of the group.
                    member.has_group = False

    def pass_on(self, number: int) -> None:
        """Sends a signal to the workers that drive the run, but not to their children."""
        for member in self._members:
            if member.ended_at is None and not member.worker.serves:
                member.process.send_signal(number)

    def signal_and_wait(self, number: int, grace: float, received: Sequence[int]) -> None:
        """Sends a signal to the workers that drive the run, and waits until they have ended.

        Args:
            number: The signal.
            grace: Seconds to wait at most.
            received: The signals sent to the launcher; a further signal ends the wait.
        """
        signals_before = len(received)
        driving = [m for m in self._members if not m.worker.serves]
        for member in driving:
            if member.ended_at is None:
                member.signal_group(number)
        deadline = time.monotonic() + grace
        while (
            any(member.ended_at is None for member in driving)
            and time.monotonic() < deadline
            and len(received) == signals_before
        ):
            self.pump()

    def end_stopped(self) -> None:
        """Kills workers that stay stopped, and names those that are silent."""
        for notice in self._stopped.notices(self._members):
            if notice.is_lost:  # the text is told with its failure
                notice.member.reason = notice.text
                notice.member.signal_group(signal.SIGKILL)
            else:
                self.say(notice.member.position, f"tfdist: {notice.text}")

    def end(self, steps: Sequence[tuple[int, float]], received: Sequence[int] = ()) -> None:
        """Ends all workers and their children.

        Args:
            steps: The signals to send in this order, each with the seconds to wait for it.
            received: The signals sent to the launcher; a further signal kills at once.
        """
        signals_before = len(received)
        for number, grace in steps:
            for member in self._members:
                if member.has_group:
                    member.heartbeat.ask_for_end()
                    member.signal_group(number)
            deadline = time.monotonic() + grace
            while self.is_running and time.monotonic() < deadline:
                # A second Ctrl-C will not wait for the first.
                if len(received) > signals_before and number != signal.SIGKILL:
                    return self.end(((signal.SIGKILL, 5.0),))
                self.pump()
        return None

    def close(self) -> None:
        """Kills what is left of the workers, and closes files and pipes."""
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
        self._logs.close()
        groups = [member.process.pid for member in self._members]
        with suppress(BrokenPipeError):
            self._screen.show(0, end_detached(self._run_name, groups))
            self._tell_log_problems()
            self._screen.close()

    def _note_state(self, now: float) -> None:
        if now - self._noted_at >= _NOTED_EVERY_S:
            self._noted_at = now
            self._journal.note_alive("running")
            self._journal.note_workers([state_of_worker(member) for member in self._members])

    def _tell_log_problems(self) -> None:
        for position, problem in self._logs.take_problems():
            self.say(position, problem)

    def _record_end(self, member: StartedWorker) -> None:
        if member.process.returncode == 0:
            self.finished.append(member.worker.task)
            return
        progress = self.progress if member.worker.serves else member.heartbeat.read()
        killed, before = killed_for_memory(), self._killed_before
        failure = Failure(
            member.worker,
            member.process.returncode,
            tuple(member.lines.last),
            progress,
            time.time(),
            member.reason,
            None if killed is None or before is None else killed > before,
        )
        self.failures.append(failure)
        if not member.heartbeat.must_end:  # else the launcher has ended it
            self._journal.note_failure(failure)

    def _read(self, member: StartedWorker) -> bool:
        """Reads once; returns whether there may be more."""
        if member.fd is None or (data := member.receive()) is None:
            return False
        if not data:
            self._selector.unregister(member.fd)
            os.close(member.fd)
            member.fd = None
            return False
        lines = member.lines.feed(data)
        live = member.lines.unfinished if member.is_live else None
        self._screen.show(member.position, self._lines_to_show(member, lines), live)
        return True

    def _lines_to_show(self, member: StartedWorker, lines: list[str]) -> list[str]:
        if member.hidden_output is None:
            return lines
        visible = member.hidden_output.take(lines)
        if len(visible) < len(lines) and not self._screen.has_explained_hiding:
            self._screen.has_explained_hiding = True
            leader = self._members[self._leader].worker
            visible.insert(0, explain_hiding(self._shows, leader))
        return visible

    def _drain(self, member: StartedWorker) -> None:
        while self._read(member):
            pass
        rest = self._lines_to_show(member, member.lines.finish())
        self._screen.show(member.position, rest, "" if member.is_live else None)
