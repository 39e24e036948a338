"""The exceptions of tfdist.

Each message says what must hold, then what was received, then what to do. Each exception
also derives from the built-in exception that a Keras user would catch.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

START_ME_AGAIN = 75
"""The exit status of a process that may be started again (EX_TEMPFAIL): it lost another
process, or training was saved after SIGTERM."""

HUNG = 76
"""The exit status of a process that detected a hang of the run (EX_PROTOCOL)."""


def outside(error: BaseException) -> TracebackType | None:
    """Returns the traceback of an error without the lines of this package.

    Args:
        error: A caught exception.
    """
    package = str(Path(__file__).parent) + os.sep
    entries, entry = [], error.__traceback__
    while entry is not None:
        entries.append(entry)
        entry = entry.tb_next
    traceback = None
    for entry in reversed(entries):
        if not entry.tb_frame.f_code.co_filename.startswith(package):
            traceback = TracebackType(
                traceback, entry.tb_frame, entry.tb_lasti, entry.tb_lineno
            )
    return traceback


class TfdistError(Exception):
    """Base class of every error that tfdist raises on purpose."""


class ArgumentError(TfdistError, ValueError):
    """An argument of a public function cannot be used."""


class ClusterError(TfdistError, ValueError):
    """The description of the cluster (TF_CONFIG, SLURM, a host list) is malformed."""


class StrategyError(TfdistError, RuntimeError):
    """A strategy cannot run here, or was requested too late."""


class DisagreementError(TfdistError, RuntimeError):
    """Workers were started with different programs, arguments or data."""


class PeerError(TfdistError, RuntimeError):
    """Another process of the cluster ended or failed, and this process needs it."""


class HungError(PeerError):
    """Another process of the cluster is alive, but does not reach this process's step."""


class ServerLostError(PeerError):
    """A parameter server ended during training, or a worker during synchronous training."""


class MembersChanged(TfdistError):  # noqa: N818, `fit` catches it: it is not an error
    """The number of processes of an elastic run changed."""


class MissingPackageError(TfdistError, ImportError):
    """An optional package is needed, and is not installed."""


class Preempted(SystemExit):
    """SIGTERM was received, training is saved, and the process ends with status 75.

    It is a `SystemExit`, so it ends a script without a traceback under any launcher.
    """

    def __init__(self) -> None:
        super().__init__(START_ME_AGAIN)


class CheckpointError(TfdistError, RuntimeError):
    """A checkpoint could not be written, or none could be read."""


class LaunchError(TfdistError, RuntimeError):
    """The launcher could not start the worker processes, or lost them."""


class BuildError(TfdistError, RuntimeError):
    """Horovod could not be built or installed, or failed its check."""
