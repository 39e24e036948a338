"""The program that a command is about: a script, a module or a model file, and its arguments.

What cannot be used is refused before TensorFlow is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tfdist.errors import LaunchError
from tfdist.launch import check_syntax, find_script

_MODEL_FILES = (".keras", ".h5")
_FUNCTION = re.compile(r"[\w.]+:\w+")
_Function = Callable[..., Any]


def program(name: str, may_be_module: bool) -> Callable[[_Function], _Function]:
    """Gives a command the program and all that follows it, which is the program's.

    Args:
        name: The name of the program's argument.
        may_be_module: Whether the command also gets `-m`, which makes it a module.
    """

    def decorate(command: _Function) -> _Function:
        # As with decorators, the last comes first.
        kind = click.UNPROCESSED
        command = click.argument("arguments", nargs=-1, type=kind, metavar="[ARGUMENTS]...")(
            command
        )
        command = click.argument(name)(command)
        if may_be_module:
            help_text = f"{name.upper()} is a module, as after python -m."
            command = click.option("-m", "--module", is_flag=True, help=help_text)(command)
        return command

    return decorate


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
