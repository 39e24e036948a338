"""The token: a secret that the launchers of a run share, from a variable or a file.

The first host makes the file if there is none. Hosts that share the home directory then have it
too; to others you copy it once.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tfdist.errors import LaunchError
from tfdist.launch.hosts import Host

TOKEN = "TFDIST_TOKEN"
"""Environment variable: the secret that all launchers of a run share."""

TOKEN_FILE = "TFDIST_TOKEN_FILE"
"""Environment variable: the file with the secret, if that is not in TFDIST_TOKEN."""

DEFAULT_FILE = "~/.tfdist-token"

_POLL_S = 0.2
_MOST_BYTES = 4096


def share_token(hosts: Sequence[Host], node_rank: int | None, limit: float) -> None:
    """Sets the variable of the token, if there are several machines. The workers inherit it.

    Args:
        hosts: The machines.
        node_rank: The position of this machine.
        limit: Seconds that another machine waits for the file.

    Raises:
        LaunchError: The file cannot be used, or does not come in time.
    """
    # What is wrong with `node_rank` is said elsewhere.
    if len(hosts) > 1 and node_rank is not None and 0 <= node_rank < len(hosts):
        names = [host.name for host in hosts]
        os.environ[TOKEN] = shared_token(names, node_rank, limit, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def shared_token(
    hosts: Sequence[str],
    node_rank: int,
    limit: float,
    say: Callable[[str], None],
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Returns the token of the launchers, and makes one on the first host if there is none.

    Args:
        hosts: The names of the machines.
        node_rank: The position of this machine.
        limit: Seconds that another machine waits for the file.
        say: Shows a line to the user.
        environ: The environment variables.

    Raises:
        LaunchError: The file cannot be used, or does not come in time.
    """
    token = environ.get(TOKEN, "")
    if token:
        return token
    named = environ.get(TOKEN_FILE, "") or DEFAULT_FILE
    path = Path(named).expanduser()
    if node_rank == 0:
        if _make(path):
            others = " and ".join(
                f"scp -p {named} {_target(host, named)}" for host in hosts[1:]
            )
            say(
                f"tfdist: made {named}, a secret that the launchers of all hosts must share. "
                f"Hosts with another home directory need a copy, once: {others}"
            )
    else:
        _wait_for(path, f"scp -p {_target(hosts[0], named)} {named}", limit, say)
    return _content(path)


def derived(token: str, purpose: str) -> str:
    """Returns a secret for one purpose, from which the token cannot be computed.

    Args:
        token: The token.
        purpose: What the secret is for.
    """
    return hmac.new(token.encode(), f"tfdist {purpose}".encode(), hashlib.sha256).hexdigest()


def _target(host: str, named: str) -> str:
    """Returns a file of another host as `scp` takes it."""
    return f"{host}:{named.removeprefix('~/')}"


def _wait_for(path: Path, copy: str, limit: float, say: Callable[[str], None]) -> None:
    deadline = time.monotonic() + limit
    if not path.exists():
        say(
            f"tfdist: waiting for {path}, a secret that node 0 makes. If this host has another "
            f"home directory than node 0, copy it, once: {copy}"
        )
    while not path.exists():
        if time.monotonic() > deadline:
            raise LaunchError(
                "The launchers of all hosts must share a token. Received: neither "
                f"{TOKEN} nor a file {str(path)!r} within {limit:g} s (--node-timeout). Copy "
                f"it ({copy}), or set {TOKEN} to the same secret on all hosts."
            )
        time.sleep(_POLL_S)


def _make(path: Path) -> bool:
    """Makes the file, completely or not at all; returns False if there is one."""
    if path.exists():
        return False
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_hex(16) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # unlike a rename, it never replaces another launcher's file
        finally:
            part.unlink()
    except FileExistsError:
        return False
    except OSError as error:
        raise LaunchError(
            "The launchers of several hosts must share a token. Received: no "
            f"{TOKEN}, and {str(path)!r} cannot be written ({error.strerror}). Set {TOKEN} to "
            "the same secret on all hosts."
        ) from None
    return True


def _content(path: Path) -> str:
    try:
        # Opened first: what is checked must be what is read.
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise LaunchError(
            f"The file of the token must be readable. Received: {str(path)!r} "
            f"({error.strerror}). Correct it, or set {TOKEN}."
        ) from None
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077 or status.st_uid not in (os.geteuid(), 0):
        raise LaunchError(
            "The file of the token must belong to you, and nobody else may read it. Received: "
            f"{str(path)!r} of user {status.st_uid} with mode {mode:04o}. "
            f"Run: chmod 600 {path}"
        )
    token = ""
    with contextlib.suppress(UnicodeDecodeError):
        token = content.decode().strip()
    if not token or len(content) > _MOST_BYTES:
        raise LaunchError(
            f"The file of the token must have one line of text. Received: {str(path)!r} with "
            f"{len(content)} bytes. Remove it, and start node 0 again, which makes another."
        )
    return token
