"""The lease of a checkpoint directory: one training at a time writes there.

A lease is a lock that expires (Gray and Cheriton, *Leases: an efficient fault-tolerant
mechanism for distributed file cache consistency*, 1989). Its owner renews it. If the owner
stops doing so, another training takes the lease, and what the first one still wants to write
is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tfdist.cluster import process_ids
from tfdist.errors import CheckpointError

RENEWED_EVERY_S = 5.0
EXPIRES_AFTER_S = 30.0
UNREADABLE_S = 10.0
"""A lease that cannot be read is written again within this time, if its owner lives."""
ENDS_WITHIN_S = 5.0
"""How long a process of this machine may still need to end, when another takes its place."""
_POLL_S = 0.2
_IN_USE: set[str] = set()
"""The tokens of this process's leases whose training runs, in this or another thread."""
_NAME = ".lease"


@dataclass(frozen=True)
class Owner:
    """What the file of a lease says.

    Attributes:
        host: The owner's host.
        pid: Its process number.
        started: When that process started, as its kernel counts: numbers are used again.
        kernel: Which running kernel and which namespace of process numbers that is.
        token: Another one for each lease.
        renewals: How often the lease was renewed.
    """

    host: str
    pid: int
    started: str
    kernel: str
    token: str
    renewals: int = 0

    @classmethod
    def here(cls) -> Owner:
        """Returns this process, with a new token."""
        pid = os.getpid()
        return cls(
            socket.gethostname(),
            pid,
            process_ids.started(pid),
            process_ids.kernel(),
            uuid.uuid4().hex,
        )

    @property
    def is_of_this_kernel(self) -> bool:
        """Whether this process can see the owner's process."""
        return self.kernel != "" and self.kernel == process_ids.kernel()

    @property
    def has_ended(self) -> bool:
        """Whether the training is known to have ended, with its process or in this one."""
        if not self.is_of_this_kernel:
            return False
        if self.pid == os.getpid():
            return self.token not in _IN_USE
        return process_ids.started(self.pid) != self.started

    @property
    def is_readable(self) -> bool:
        """Whether the file of the lease names an owner."""
        return self.token != ""

    @property
    def expires_after(self) -> float:
        """Seconds of silence after which another training may take the lease."""
        return EXPIRES_AFTER_S if self.is_readable else UNREADABLE_S

    def __str__(self) -> str:
        if not self.is_readable:
            return "an unknown process"
        if self.is_of_this_kernel and self.pid == os.getpid():
            return "another `fit` of this process"
        is_stopped = self.is_of_this_kernel and process_ids.state(self.pid) == "T"
        stopped = " (stopped, by SIGSTOP say: `kill -CONT` lets it go on)" if is_stopped else ""
        return f"process {self.pid} on {self.host}{stopped}"


class Lease:
    """The lease of a directory, for one training.

    Args:
        directory: The directory of the checkpoints.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / _NAME
        self._owned: Owner | None = None

    @property
    def token(self) -> str:
        """The token of this training's lease, "" without one."""
        return "" if self._owned is None else self._owned.token

    def take(self) -> None:
        """Takes the lease, as soon as its owner has ended or was silent for too long.

        Raises:
            CheckpointError: Another training has it, and goes on; or the directory is not
                writable.
        """
        try:
            self._take(Owner.here())
        except OSError as error:
            raise CheckpointError(
                "`checkpoint` must be a directory that can be written. Received: "
                f"{str(self._directory)!r} ({error.strerror}). Choose another one."
            ) from None

    def _take(self, owner_here: Owner) -> None:
        begin_time, first_owner, is_told = time.monotonic(), self._owner(), False
        while not self._create(owner_here):
            owner = self._owner()
            if owner is None:
                continue  # it was released just now
            waited = time.monotonic() - begin_time
            # A process on another host cannot be looked at. It lives if it renews the lease,
            # and counts as dead if it has not done so for long enough.
            if owner.has_ended or (owner == first_owner and waited > owner.expires_after):
                self._remove(owner)
                continue
            is_renewed = first_owner is not None and owner != first_owner
            if is_renewed or (owner.is_of_this_kernel and waited > ENDS_WITHIN_S):
                raise CheckpointError(
                    "One training at a time must use a checkpoint directory. Received: "
                    f"{str(self._directory)!r}, to which {owner} writes. End it, or choose "
                    "another directory."
                )
            first_owner = first_owner or owner
            if not is_told and not owner.is_of_this_kernel:
                is_told = True
                self._tell(owner)
            time.sleep(_POLL_S)
        self._owned = owner_here

    def _tell(self, owner: Owner) -> None:
        text = f"{owner} has used {str(self._directory)!r}."
        if not owner.is_readable:
            text = f"{str(self._file)!r} is empty or damaged, so its owner is not known."
        print(
            f"tfdist: {text} This process waits up to {owner.expires_after:g} s for a sign "
            "that it is still used.",
            file=sys.stderr,
            flush=True,
        )

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renews the lease now and then in a thread, and releases it at the end."""
        if self._owned is None:  # on other workers than the chief
            yield
            return
        is_over = threading.Event()

        def renew() -> None:
            while not is_over.wait(RENEWED_EVERY_S):
                with contextlib.suppress(OSError):  # a full disk: there will be room again
                    self._renew()

        token = self._owned.token
        _IN_USE.add(token)
        thread = threading.Thread(target=renew, name="tfdist-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            self.release()
            _IN_USE.discard(token)

    def check(self) -> None:
        """Checks that this training still has the lease.

        Raises:
            CheckpointError: Another one has taken it.
        """
        owner = self._owner()
        if self._owned is None or (owner is None and self._create(self._owned)):
            return
        if owner is not None and not owner.is_readable:
            with contextlib.suppress(OSError):
                self._renew()
            owner = self._owner()
        if owner is None or owner.token != self._owned.token:
            raise CheckpointError(
                "A training must have its checkpoint directory for itself. Received: "
                f"{str(self._directory)!r}, which {owner or 'another process'} has taken. This "
                "one was silent for too long, and writes no more."
            )

    def release(self) -> None:
        """Removes the lease, if this training still has it."""
        owned, self._owned = self._owned, None
        with contextlib.suppress(OSError):  # a folder that is gone has no lease either
            if owned is not None and (owner := self._owner()) and owner.token == owned.token:
                self._file.unlink(missing_ok=True)

    def _renew(self) -> None:
        owner = self._owner()
        if self._owned is None or owner is None:
            return
        if owner.is_readable and owner.token != self._owned.token:
            return
        self._owned = replace(self._owned, renewals=self._owned.renewals + 1)
        self._draft(self._owned).replace(self._file)

    def _create(self, owner: Owner) -> bool:
        """Makes the file of the lease, complete, unless there is one."""
        file = self._draft(owner)
        try:
            # A hard link appears with its contents, and fails if the name exists. So of two
            # processes at most one gets the lease.
            os.link(file, self._file)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with self._file.open("x") as lease_file:
                    lease_file.write(file.read_text())
            except FileExistsError:
                return False
        finally:
            file.unlink(missing_ok=True)
        return True

    def _draft(self, owner: Owner) -> Path:
        file = self._directory / f"{_NAME}-{owner.token}"
        try:
            file.write_text(json.dumps(asdict(owner)))
        except OSError:
            file.unlink(missing_ok=True)
            raise
        return file

    def _owner(self) -> Owner | None:
        # Where hard links are missing, the file may be read while it is written.
        for _ in range(2):
            try:
                owner = _owner_in(self._file.read_bytes())
            except FileNotFoundError:
                return None
            if owner is not None:
                return owner
            time.sleep(_POLL_S)  # it is being written
        return Owner("", 0, "", "", "")

    def _remove(self, owner: Owner) -> None:
        """Removes the lease of an owner that has ended, but not one that came after it."""
        # Between a look at the file and its removal, another training may have taken the lease.
        # So the file is moved aside first, and put back if it is not the one.
        aside = self._directory / f"{_NAME}-{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            self._file.rename(aside)
            taken = _owner_in(aside.read_bytes())
            if taken is not None and taken.token != owner.token:
                with contextlib.suppress(OSError):
                    os.link(aside, self._file)
        aside.unlink(missing_ok=True)


def token_in(directory: Path) -> str:
    """Returns the token of the lease in a directory, "" if there is none.

    Args:
        directory: The directory of the checkpoints.
    """
    with contextlib.suppress(OSError):
        owner = _owner_in((directory / _NAME).read_bytes())
        return "" if owner is None else owner.token
    return ""


def _owner_in(content: bytes) -> Owner | None:
    """Reads the content of a lease; None if it is none."""
    try:
        owner = Owner(**json.loads(content))
        is_sound = isinstance(owner.token, str) and isinstance(owner.pid, int)
    except (ValueError, TypeError, RecursionError):
        return None
    return owner if is_sound and owner.token else None
