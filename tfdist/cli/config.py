"""`tfdist config`: writes `tfdist.toml`, which `tfdist run` reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tfdist.cli.run import run
from tfdist.cli.settings_file import FILE, Settings, check_variable, kept_options, text_of
from tfdist.errors import LaunchError
from tfdist.launch import RestartLimit, parse_elastic, parse_hosts
from tfdist.launch.extent import extent


@click.command(
    params=[
        click.Option(
            ["--env"],
            multiple=True,
            metavar="NAME=VALUE",
            help="An environment variable for all workers. May be given several times.",
        ),
        click.Option(
            ["--to"],
            type=click.Path(dir_okay=False, path_type=Path),
            default=FILE,
            show_default=True,
            metavar="FILE",
            help="The file to write.",
        ),
        click.Option(["--force"], is_flag=True, help="Replace the file if there is one."),
        *kept_options(run).values(),
    ]
)
@click.pass_context
def config(
    ctx: click.Context, /, env: tuple[str, ...], to: Path, force: bool, **values: Any
) -> None:
    """Write tfdist.toml, which `tfdist run` reads in its working directory.

    It takes the options of `tfdist run`, and writes those that you give. Without options it
    asks for the workers, the strategy and the environment. In a run, options of the command
    line and variables of the shell win.

    \b
    Examples:
      tfdist config -n 2
      tfdist config --hosts node1:4,node2:4 --strategy horovod --env NCCL_DEBUG=WARN

    Exit status: 0 if the file is written, else 1; 2 if the command line is wrong.
    """  # noqa: D301
    options = {
        name: value
        for name, value in values.items()
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if to.exists() and not force:
        raise LaunchError(
            f"{to} must not be there yet. Received: a file of this name. Edit it, or add "
            "--force to replace it."
        )
    if not options and not env:
        if not sys.stdin.isatty():
            raise click.UsageError(
                "Options must say what to write. Received: none. Give those of `tfdist run`, "
                "such as -n 2."
            )
        options, env = _ask()
    _check(options)
    text = text_of(Settings(to, options, dict(_variable(to, pair) for pair in env)), run)
    try:
        to.write_text(text)
    except OSError as error:
        raise LaunchError(
            f"The file must be one that can be written. Received: {str(to)!r} "
            f"({error.strerror}). Choose another with --to."
        ) from None
    click.echo(text, nl=False)
    reading = "" if to == FILE else f" --config {to}"
    click.echo(f"\nWritten to {to}. Start with: tfdist run{reading} train.py", err=True)


def _ask() -> tuple[dict[str, Any], tuple[str, ...]]:
    """Asks for the settings on the terminal."""
    options: dict[str, Any] = {}
    where = click.prompt(
        "Number of workers on this machine, or hosts such as node1:2,node2:2", default="2"
    ).strip()
    if where.isdecimal():
        options["workers"] = int(where)
    else:
        options["hosts"] = where
    of_strategy = kept_options(run)["strategy"]
    strategy = click.prompt("Strategy", default="auto", type=of_strategy.type)
    if strategy != "auto":
        options["strategy"] = strategy
    env = click.prompt("Environment variables NAME=VALUE, with spaces between them", default="")
    return options, tuple(env.split())


def _check(options: dict[str, Any]) -> None:
    """Refuses what `tfdist run` would refuse on every machine."""
    hosts = parse_hosts(options["hosts"]) if "hosts" in options else ()
    if "elastic" in options:
        parse_elastic(options["elastic"])
    else:
        extent(options.get("workers"), hosts, 0 if hosts else None)
    if "max_restarts" in options:
        RestartLimit.parse(options["max_restarts"])


def _variable(path: Path, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals:
        raise click.BadParameter(
            f"--env must be NAME=VALUE. Received: --env {pair!r}. Write it like TF_XLA_FLAGS=1."
        )
    return name, check_variable(path, name, value)
