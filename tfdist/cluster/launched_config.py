"""TF_CONFIG as it was when `tfdist run` started this process: a script's own comes too late."""

from __future__ import annotations

import os
import sys

_NAME = "TF_CONFIG"

_kept: str | None = None
_is_connected = False
_speaks = False


def keep(is_connected: bool, speaks: bool) -> None:
    """Remembers TF_CONFIG as it is now.

    Args:
        is_connected: Whether this process is connected to others.
        speaks: Whether it is the one of them that says what it sees.
    """
    global _kept, _is_connected, _speaks
    _kept, _is_connected, _speaks = os.environ.get(_NAME, ""), is_connected, speaks


def restore(alone: bool = False) -> None:
    """Says once that a TF_CONFIG which was set since has no effect.

    In a process that is connected it is put back, for what TensorFlow reads there.

    Args:
        alone: Whether this process is about to train alone.
    """
    global _kept, _speaks
    now = os.environ.get(_NAME, "")
    if _kept is None or now == _kept or not (_is_connected or alone):
        return
    if not _is_connected:
        _kept = now
    elif _kept:
        os.environ[_NAME] = _kept
    else:
        del os.environ[_NAME]
    if not _speaks:
        return
    _speaks = False
    effect = "is connected already" if _is_connected else "trains alone"
    print(
        "tfdist: the script has set TF_CONFIG after `tfdist run` started it: this process "
        f"{effect}, and ignores it. Set TF_CONFIG before `tfdist run`, or start the script "
        "with `python` and call tfdist.init() after that line.",
        file=sys.stderr,
        flush=True,
    )
