"""TF_CONFIG as `tfdist run` set it for this process; a script that sets it comes too late."""

from __future__ import annotations

import os
import sys

_NAME = "TF_CONFIG"

_config_at_launch: str | None = None
_is_connected = False
_may_warn = False


def remember(is_connected: bool, may_warn: bool) -> None:
    """Remembers the present TF_CONFIG.

    Args:
        is_connected: Whether this process is connected to other workers.
        may_warn: Whether this process is the worker that prints warnings.
    """
    global _config_at_launch, _is_connected, _may_warn
    _config_at_launch = os.environ.get(_NAME, "")
    _is_connected, _may_warn = is_connected, may_warn


def restore(alone: bool = False) -> None:
    """Warns once if the script has set TF_CONFIG since: that has no effect.

    In a connected process it restores the first TF_CONFIG, because TensorFlow reads it again.

    Args:
        alone: Whether this process is about to train alone.
    """
    global _config_at_launch, _may_warn
    current = os.environ.get(_NAME, "")
    if (
        _config_at_launch is None
        or current == _config_at_launch
        or not (_is_connected or alone)
    ):
        return
    if not _is_connected:
        _config_at_launch = current
    elif _config_at_launch:
        os.environ[_NAME] = _config_at_launch
    else:
        del os.environ[_NAME]
    if not _may_warn:
        return
    _may_warn = False
    effect = "is connected already" if _is_connected else "trains alone"
    print(
        "tfdist: the script has set TF_CONFIG after `tfdist run` started it: this process "
        f"{effect}, and ignores it. Set TF_CONFIG before `tfdist run`, or start the script "
        "with `python` and call tfdist.init() after that line.",
        file=sys.stderr,
        flush=True,
    )
