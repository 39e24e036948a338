"""The exceptions of tfdist.

Each message says what must hold, then what was received, then what to do.
They derive from the built-in exception a Keras user would catch.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

START_ME_AGAIN = 75
"""The exit status of a process that nothing is wrong with but what it lost (EX_TEMPFAIL)."""

HUNG = 76
"""The exit status of a process that found that the run hangs (EX_PROTOCOL)."""


def outside(error: BaseException) -> TracebackType | None:
    """Gives an error's traceback without this package's lines.

    Args:
        error: That was caught.
    """
    package = str(Path(__file__).parent) + os.sep
    kept, part, parts = None, error.__traceback__, []
    while part is not None:
        parts.append(part)
        part = part.tb_next
    for part in reversed(parts):
        if not part.tb_frame.f_code.co_filename.startswith(package):
            kept = TracebackType(kept, part.tb_frame, part.tb_lasti, part.tb_lineno)
    return kept


class TfdistError(Exception):
    """Base class of every error that tfdist raises on purpose."""


class ArgumentError(TfdistError, ValueError):
    """An argument of a public function cannot be used as it was given."""


class ClusterError(TfdistError, ValueError):
    """The description of the cluster (TF_CONFIG, SLURM, a host list) is malformed."""


class StrategyError(TfdistError, RuntimeError):
    """A strategy cannot run here, or was asked for too late."""


class DisagreementError(TfdistError, RuntimeError):
    """Workers were started with different programs, arguments or data."""


class PeerError(TfdistError, RuntimeError):
    """Another process of the cluster ended or failed while this one needed it."""


class HungError(PeerError):
    """Another process of the cluster lives, and does not come to where this one waits."""


class ServerLostError(PeerError):
    """A parameter server, or in synchronous training a worker, ended while it was needed."""


class MembersChanged(TfdistError):  # noqa: N818, `fit` catches it: nothing went wrong
    """An elastic run has more or fewer processes from now on."""


class MissingPackageError(TfdistError, ImportError):
    """An optional package is needed for what was asked, and is not installed."""


class Preempted(SystemExit):
    """SIGTERM came, training is saved, and the process ends with status 75.

    As a `SystemExit` it ends a script without a traceback, whoever started it.
    """

    def __init__(self) -> None:
        super().__init__(START_ME_AGAIN)


class CheckpointError(TfdistError, RuntimeError):
    """A checkpoint could not be written, or none could be read."""


class LaunchError(TfdistError, RuntimeError):
    """The launcher could not start or keep the worker processes."""


class BuildError(TfdistError, RuntimeError):
    """Horovod could not be built, installed, or made to reduce."""
