"""The file `tfdist.toml`: options of `tfdist run` that a folder keeps."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tfdist.errors import LaunchError

FILE = Path("tfdist.toml")
"""The file that `tfdist run` reads in the working directory."""

ENVIRONMENT = "environment"
_HEADER = (
    "# Options of `tfdist run` in this folder, by their long names. The command line wins.\n"
)
_SETTINGS = "tfdist.settings"
# These differ from host to host or from run to run.
_NOT_KEPT = ("config", "node_rank", "module", "explain", "joined", "help")
# Each says how many workers there are and where: one of the command line replaces the others.
_REPLACES = {
    "workers": ("hosts", "elastic", "ssh"),
    "hosts": ("workers", "elastic"),
    "elastic": ("workers",),
}
_NOT_IN_FILE = {
    "TF_CONFIG": "It differs from process to process: set it where each starts.",
    "TFDIST_TOKEN": "It is a secret, and files are copied: set it in the shell, or leave it to "
    "tfdist.",
}


@dataclass(frozen=True)
class Settings:
    """What a file says.

    Attributes:
        path: The file.
        options: Values of the options of `tfdist run`, by the names of click's parameters.
        environment: Environment variables for the launcher and its workers.
    """

    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


class CommandWithFile(click.Command):
    """A command whose options may come from a file; those of the command line win."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command with the options of the file that the command line leaves open."""
        _settle(ctx)
        return super().invoke(ctx)


def kept_options(command: click.Command) -> dict[str, click.Option]:
    """Returns the options that a file may have, by their keys, the long names.

    Args:
        command: The command `run`.
    """
    options = (p for p in command.params if isinstance(p, click.Option))
    return {_key(option): option for option in options if option.name not in _NOT_KEPT}


def read_file(ctx: click.Context, _: click.Parameter, value: Path | None) -> Path | None:
    """Reads the file, as the callback of the option that names it.

    Args:
        ctx: The command's context, which gets the values as its defaults.
        value: The file; None for `tfdist.toml` if there is one.

    Raises:
        LaunchError: The file cannot be read, or has something that is no option.
    """
    path = value or (FILE if FILE.is_file() else None)
    if path is not None and not ctx.resilient_parsing:
        settings = parse(path, ctx.command)
        ctx.default_map = {**(ctx.default_map or {}), **settings.options}
        ctx.meta[_SETTINGS] = settings
    return value


def parse(path: Path, command: click.Command) -> Settings:
    """Reads and checks a file.

    Args:
        path: The file.
        command: The command `run`, whose options may be set.

    Raises:
        LaunchError: The file cannot be read, or has something that is no option.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"{path} must be a file in TOML. Received: {error}. Correct it, or write it anew: "
            "tfdist config --force -n 2."
        ) from None
    table = content.pop(ENVIRONMENT, {})
    known, options = kept_options(command), {}
    for key, value in content.items():
        option = known.get(key)
        if option is None:
            raise LaunchError(
                f"{path} must have only long names of options of `tfdist run`, and "
                f"[{ENVIRONMENT}]. Received: {key} = {value!r}.{_advice(key, known)}"
            )
        options[str(option.name)] = _checked(path, key, option, value)
    return Settings(path, options, _checked_environment(path, table))


def text_of(settings: Settings, command: click.Command) -> str:
    """Returns the text of a file.

    Args:
        settings: What it is to say.
        command: The command `run`.
    """
    lines = [_HEADER]
    for key, option in kept_options(command).items():
        if option.name in settings.options:
            value = settings.options[option.name]
            lines.append(f"{key} = {_toml(value if _is_plain(value) else str(value))}\n")
    if settings.environment:
        lines.append(f"\n[{ENVIRONMENT}]\n")
        lines += [f"{k} = {_toml(v)}\n" for k, v in settings.environment.items()]
    return "".join(lines)


def check_variable(path: Path, name: str, value: object) -> str:
    """Returns the text of an environment variable.

    Args:
        path: The file, for messages.
        name: The variable.
        value: A text or a number.

    Raises:
        LaunchError: It cannot be set from a file.
    """
    received = f"Received: {name} = {value!r} in {path}."
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise LaunchError(
            f"An environment variable must have a name of letters, digits and _. {received}"
        )
    if name in _NOT_IN_FILE:
        raise LaunchError(
            f"[{ENVIRONMENT}] must not have {name}. Received: a value for it in {path}. "
            f"{_NOT_IN_FILE[name]}"
        )
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise LaunchError(
            f"An environment variable must be a text or a number. {received} Put it in quotes."
        )
    text = str(value)
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise LaunchError(f"An environment variable must be one line of text. {received}")
    return text


def file_variables(ctx: click.Context) -> tuple[str, ...]:
    """Returns the names of the environment variables that the file has set."""
    settings = ctx.meta.get(_SETTINGS)
    return tuple(settings.environment) if isinstance(settings, Settings) else ()


def _settle(ctx: click.Context) -> None:
    """Gives way to the command line, sets the variables, and says what the file has given."""
    settings = ctx.meta.get(_SETTINGS)
    if not isinstance(settings, Settings):
        return
    given = {n for n in ctx.params if _source(ctx, n) is ParameterSource.COMMANDLINE}
    dropped = {name for key in given for name in _REPLACES.get(key, ())} - given
    told = []
    for key, option in kept_options(ctx.command).items():
        name = str(option.name)
        if name not in settings.options or name in given:
            continue
        if name in dropped:
            ctx.params[name] = option.default if option.is_flag else None
        else:
            value = settings.options[name]
            told.append(f"--{key}" if value is True else f"--{key} {value}")
    variables = {k: v for k, v in settings.environment.items() if k not in os.environ}
    os.environ.update(variables)  # the workers inherit them
    told += [f"environment {name}" for name in variables]
    if told:
        click.echo(f"tfdist: from {settings.path}: {', '.join(told)}", err=True)


def _source(ctx: click.Context, name: str) -> ParameterSource | None:
    return ctx.get_parameter_source(name)


def _key(option: click.Option) -> str:
    return max(option.opts, key=len).removeprefix("--")


def _advice(key: str, known: Mapping[str, click.Option]) -> str:
    if key.replace("-", "_") in _NOT_KEPT:
        return f" Give --{key.replace('_', '-')} on the command line: a file does not keep it."
    names = {name.replace("-", "_"): name for name in known}
    close = difflib.get_close_matches(key.replace("-", "_"), names, 1)
    if close:
        return f" Write {names[close[0]]}."
    return f" They are {', '.join(known)}."


def _checked(path: Path, key: str, option: click.Option, value: Any) -> Any:
    """Checks a value as the command line would."""
    if key == "hosts" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = ",".join(value)
    if key in ("max-restarts", "health") and type(value) is int:
        value = str(value)
    kinds: dict[type, str] = {str: "a text in quotes"}
    if option.is_flag:
        kinds = {bool: "true or false"}
    elif isinstance(option.type, type(click.INT)):
        kinds = {int: "a whole number"}
    elif isinstance(option.type, type(click.FLOAT)):
        kinds = {float: "a number", int: "a number"}
    if type(value) not in kinds:
        kind = next(iter(kinds.values()))
        raise LaunchError(f"{key} in {path} must be {kind}. Received: {key} = {value!r}.")
    try:
        option.type.convert(value, option, None)
    except click.BadParameter as error:
        raise LaunchError(
            f"{key} in {path} must be a value that --{key} takes. Received: {key} = {value!r}. "
            f"{error.message}"
        ) from None
    return value


def _checked_environment(path: Path, table: object) -> dict[str, str]:
    if not isinstance(table, dict):
        raise LaunchError(
            f"[{ENVIRONMENT}] in {path} must be a table of variables. Received: {table!r}."
        )
    return {name: check_variable(path, name, value) for name, value in table.items()}


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def _toml(value: object) -> str:
    # Of texts without control characters, JSON's quotes are TOML's.
    return json.dumps(value, ensure_ascii=False)
