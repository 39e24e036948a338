"""`tfdist run --ssh`: what the launchers of the other hosts get from the first one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence

import click

from tfdist.cli.settings_file import file_variables
from tfdist.errors import LaunchError
from tfdist.launch import TOKEN, Host, RemoteTask, check_first_host, forwarded

# The others have their own, or none.
_OF_THIS_HOST = ("config", "ssh", "joined", "node_rank", "output", "health", "explain")


def check_ssh(hosts: Sequence[Host], node_rank: int | None) -> int:
    """Checks that this machine can start the others.

    Args:
        hosts: The machines.
        node_rank: The position of this one, if it is given.

    Returns:
        The position of this machine, the first.

    Raises:
        LaunchError: There are no other hosts, or this machine is not the first.
    """
    if len(hosts) < 2:
        raise LaunchError(
            "--ssh must come with two or more --hosts. Received: "
            f"{len(hosts)} host(s). Write it like --hosts node1:2,node2:2 --ssh."
        )
    if node_rank not in (None, 0):
        raise LaunchError(
            f"--ssh must come without --node-rank. Received: --node-rank {node_rank}. Start "
            "once, on the first host."
        )
    check_first_host(hosts)
    return 0


def task_of(ctx: click.Context, can_return: bool) -> RemoteTask:
    """Returns what the other launchers are to do, and makes a token for this run.

    Args:
        ctx: The context of `tfdist run`.
        can_return: Whether the run may go on without a host, or wait for it.
    """
    os.environ.setdefault(TOKEN, secrets.token_hex(16))
    environment = forwarded(os.environ, file_variables(ctx))
    return RemoteTask(_arguments(ctx), environment=environment, can_return=can_return)


def _arguments(ctx: click.Context) -> tuple[str, ...]:
    """Writes the options of this run as a command line."""
    # No file: what this host has read from one is among the options.
    arguments = ["--config", os.devnull, "--joined"]
    shown = ctx.params["output"]
    arguments += ["--output", "failed" if shown == "chief" else shown]
    for option in ctx.command.params:
        name, value = str(option.name), ctx.params.get(str(option.name))
        is_default = value is None or value is False or name in _OF_THIS_HOST
        if is_default or not isinstance(option, click.Option):
            continue
        flag = max(option.opts, key=len)
        arguments += [flag] if option.is_flag else [flag, str(value)]
    return (*arguments, ctx.params["script"], *ctx.params["arguments"])
