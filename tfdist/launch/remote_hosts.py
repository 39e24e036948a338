"""The launchers of other hosts, which `tfdist run --ssh` starts with `ssh`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from tfdist.errors import LaunchError
from tfdist.launch.hosts import Host
from tfdist.launch.signals import handling

READY = "tfdist: the launcher of this host is ready"
"""The first line of a remote launcher: what comes before is ssh's or the shell's."""

INTERRUPTED_S = 5.0
"""Seconds that the other launchers get to end after Ctrl-C, before they are told to end."""

_SSH = (
    "ssh",
    "-T",
    *("-o", "BatchMode=yes"),  # nobody is there to answer questions
    *("-o", "ConnectTimeout=20"),
    *("-o", "ServerAliveInterval=10"),
    *("-o", "ServerAliveCountMax=3"),
)
# The launchers end together; this one waits so long for the end of the others.
_END_S = 30.0
# A launcher that has ended with a failure has told this one, which then ends by itself.
_SHOWN_S = 1.0  # a process that ssh has left behind may hold its standard error open
_TOLD_S = 10.0
_KILL_S = 5.0
_FORWARDED = (
    "TFDIST_",
    "TF_",
    "XLA_",
    "KERAS_",
    "NCCL_",
    "GRPC_",
    "HOROVOD_",
    "OMP_",
    "PYTHON",
)
_NOT_FORWARDED = ("TF_CONFIG", "TFDIST_RUN", "TFDIST_LAUNCHER_FD", "TFDIST_TOKEN_FILE")


@dataclass(frozen=True)
class RemoteTask:
    """What a remote launcher is to do.

    Attributes:
        arguments: The arguments of `tfdist run` that are the same on all hosts.
        folder: The folder in which it works.
        environment: Variables that it and its workers get, and its secret.
        can_return: Whether the run may go on without the host, or wait for it.
    """

    arguments: tuple[str, ...]
    folder: str = field(default_factory=os.getcwd)
    environment: Mapping[str, str] = field(default_factory=dict)
    can_return: bool = False

    def line(self, node_rank: int) -> bytes:
        """Returns the line that a remote launcher reads first.

        Args:
            node_rank: The position of its host.
        """
        arguments = ["--node-rank", str(node_rank), *self.arguments]
        values = {
            "folder": self.folder,
            "environment": dict(self.environment),
            "arguments": arguments,
        }
        return json.dumps(values).encode() + b"\n"


def forwarded(environ: Mapping[str, str], names: Sequence[str] = ()) -> dict[str, str]:
    """Chooses the variables that the other hosts get.

    Args:
        environ: The launcher's variables.
        names: Further names.
    """
    return {
        name: value
        for name, value in environ.items()
        if name in names or (name.startswith(_FORWARDED) and name not in _NOT_FORWARDED)
    }


def check_first_host(hosts: Sequence[Host]) -> None:
    """Checks that this machine is the first host, where the launchers meet.

    Args:
        hosts: The machines.

    Raises:
        LaunchError: Another machine is.
    """
    if not is_here(hosts[0].name):
        raise LaunchError(
            "With --ssh, this machine must be the first of --hosts. Received: --hosts "
            f"{hosts[0].name},..., an address that this machine does not have. Start on "
            f"{hosts[0].name}, or put this machine first."
        )


def is_here(name: str) -> bool:
    """Returns whether a host's name is that of an address of this machine.

    Args:
        name: The name. An alias that only ssh knows is that of another machine.
    """
    try:
        addresses = socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as held:
            held.bind((address[0], 0, *address[2:]))
            return True
    return False


class RemoteLaunchers:
    """The launchers of the other hosts, one `ssh` a host, while a run lasts.

    Their standard input stays open. Its end tells a remote launcher to end, also if this
    process is killed or the network fails.

    Args:
        hosts: All machines of the run; this one is the first.
        task: What the others are to do.

    Attributes:
        error: Why the run cannot go on; empty if it can.
    """

    def __init__(self, hosts: Sequence[Host], task: RemoteTask) -> None:
        self.error = ""
        self._task, self._is_over = task, False
        self._remotes: list[_Remote] = []
        try:
            for rank, host in enumerate(hosts[1:], 1):
                self._remotes.append(_Remote(host.name.strip("[]"), task.line(rank)))
        except BaseException:
            self.close(0.0)
            raise
        self._threads = [
            threading.Thread(target=work, args=(remote,), name="tfdist-ssh", daemon=True)
            for remote in self._remotes
            for work in (self._follow, remote.show_errors)
        ]

    def follow(self) -> None:
        """Begins to show their output. From now on SIGTERM to this process ends the run."""
        for thread in self._threads:
            thread.start()

    def close(self, limit: float = _END_S) -> None:
        """Waits for the other launchers, and ends those that do not end by themselves.

        Args:
            limit: Seconds to wait.
        """
        self._is_over = True
        deadline = time.monotonic() + limit
        for remote in self._remotes:
            remote.wait(deadline - time.monotonic())
        for remote in self._remotes:
            remote.ask_for_end()
        deadline = time.monotonic() + _KILL_S
        for remote in self._remotes:
            if not remote.wait(deadline - time.monotonic()):
                remote.process.kill()
                remote.process.wait()

    def _follow(self, remote: _Remote) -> None:
        """Shows a launcher's output, and ends the run if it cannot go on without it."""
        remote.show_output()
        status = remote.process.wait()
        remote.has_shown_errors.wait(_SHOWN_S)  # the reason comes before the consequence
        if self._is_over or status == 0:
            return
        if not remote.is_ready:
            self._end(
                f"tfdist must be able to start on {remote.host}. Received: exit status "
                f"{status} of ssh. Check that `ssh -o BatchMode=yes {remote.host} "
                f"{sys.executable} -m tfdist --version` works."
            )
            return
        if self._task.can_return:
            _say(f"tfdist: {remote.host}: ssh has ended with exit status {status}.")
            return
        deadline = time.monotonic() + _TOLD_S
        while not self._is_over and time.monotonic() < deadline:
            time.sleep(0.1)
        if not self._is_over:
            self._end(f"The launcher on {remote.host} has ended with exit status {status}.")

    def _end(self, error: str) -> None:
        self.error = self.error or error
        os.kill(os.getpid(), signal.SIGTERM)


class _Remote:
    """The launcher of one host."""

    def __init__(self, host: str, line: bytes) -> None:
        self.host, self.is_ready = host, False
        self.has_shown_errors = threading.Event()
        try:
            self.process = subprocess.Popen(
                ssh_command(host, "tfdist.cli.remote"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this launcher, which tells the others
            )
        except OSError as error:
            raise LaunchError(
                f"--ssh must find the program ssh. Received: {error.strerror}. Install it, or "
                "start `tfdist run` on each host."
            ) from None
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(line)
            self._stdin.flush()

    def show_output(self) -> None:
        """Shows whole lines, from the launcher's first line on."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            line = text.decode(errors="replace").rstrip("\r\n")
            if self.is_ready:
                _say(line, sys.stdout)
            elif line == READY:
                self.is_ready = True
            else:
                _say(f"{self.host}: {line}")

    def show_errors(self, _: object = None) -> None:
        """Shows what ssh and the launcher write as errors."""
        assert self.process.stderr is not None
        for text in self.process.stderr:
            line = text.decode(errors="replace").rstrip("\r\n")
            _say(f"{self.host}: {line}" if line else "")
        self.has_shown_errors.set()

    def ask_for_end(self) -> None:
        """Ends the standard input of the launcher, which ends it."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def wait(self, limit: float) -> bool:
        """Waits for the end.

        Args:
            limit: Seconds.

        Returns:
            Whether it has ended.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, limit))
        return self.process.returncode is not None

    @property
    def _stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin


@contextlib.contextmanager
def remote_launchers(
    hosts: Sequence[Host], task: RemoteTask | None
) -> Iterator[RemoteLaunchers | None]:
    """Starts the launchers of the other hosts, which end with the context.

    Args:
        hosts: All machines; this one is the first.
        task: What the others are to do; None to start none.

    Raises:
        LaunchError: One of them could not start, or has ended.
    """
    if task is None or len(hosts) < 2:
        yield None
        return
    remotes = RemoteLaunchers(hosts, task)

    def end(number: int, _: FrameType | None) -> None:
        # Before and after the workers run. While they do, their launcher handles signals.
        if remotes.error:
            raise LaunchError(remotes.error)
        sys.exit(128 + number)

    with handling((signal.SIGTERM,), end):
        remotes.follow()
        try:
            yield remotes
        except BaseException:
            remotes.close(0.0)
            raise
        remotes.close(0.0 if remotes.error else _END_S)
    if remotes.error:
        raise LaunchError(remotes.error)


def ssh_command(host: str, module: str, *arguments: str) -> list[str]:
    """Returns the command that runs a module of tfdist on another host, by this Python's path.

    It has no secret: anyone sees it there.

    Args:
        host: The host.
        module: The module.
        *arguments: Its arguments.
    """
    paths = os.environ.get("PYTHONPATH")
    path = ("env", f"PYTHONPATH={paths}") if paths else ()
    command = "exec " + shlex.join([*path, sys.executable, "-m", module, *arguments])
    return [*_SSH, host, command]


def _say(line: str, stream: IO[str] | None = None) -> None:
    """Writes a line, and first erases an unfinished one, which its worker draws again."""
    stream = stream or sys.stderr
    erased = "\r\x1b[K" if stream.isatty() else ""
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{erased}{line}\n")
        stream.flush()
