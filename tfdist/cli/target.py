"""Refuses a script or a model file that cannot be used, before TensorFlow is imported."""

from __future__ import annotations

import re
from pathlib import Path

import click

from tfdist.errors import LaunchError
from tfdist.launch import check_syntax, find_script

_MODEL_FILES = (".keras", ".h5")
_FUNCTION = re.compile(r"[\w.]+:\w+")


def check_script(script: str, module: bool) -> None:
    """Refuses a script that cannot run.

    Args:
        script: The script, or a module.
        module: Whether it is a module, as after `python -m`.

    Raises:
        BadParameter: There is no such script or module.
        LaunchError: It has a syntax error, or you may not read it.
    """
    try:
        path = find_script(script, module)
    except LaunchError as error:
        raise click.BadParameter(str(error)) from None
    if path is not None:
        check_syntax(path)


def check_target(target: str, module: bool) -> None:
    """Refuses a target of `tfdist recommend` that is not there.

    Args:
        target: A script, a module, a model file, or `module:function`.
        module: Whether it is a module, as after `python -m`.

    Raises:
        BadParameter: There is no such file or module.
        LaunchError: It is a script with a syntax error, or one that you may not read.
    """
    if module:
        return check_script(target, module)
    if target.endswith(_MODEL_FILES):
        if not Path(target).is_file():
            raise click.BadParameter(
                "TARGET must be a script, a model file or module:function. Received: "
                f"{target!r}, which is not there. Check the path."
            )
        return None
    if _FUNCTION.fullmatch(target) and not Path(target).exists():
        return None  # whether it can be imported is known only there
    return check_script(target, module)
