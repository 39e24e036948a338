"""`tfdist run`: starts the worker processes of a script, and explains failures."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from tfdist.cli.examine import explain_run
from tfdist.cli.explanation import explain as explain_end
from tfdist.cli.run_options import RunOptions
from tfdist.cli.settings_file import CommandWithFile, read_file
from tfdist.cli.ssh import check_ssh, task_of
from tfdist.cli.target import check_script, program
from tfdist.cluster import strategy_names
from tfdist.errors import START_ME_AGAIN
from tfdist.launch import (
    DEFAULT_PORT,
    INTERRUPTED_S,
    NODE_TIMEOUT_S,
    SAVING_S,
    TOKEN,
    CoordinatorClient,
    Host,
    Journal,
    Outcome,
    RestartLimit,
    Restarts,
    Roster,
    check_names,
    connect_launchers,
    count_on_processor,
    crowded_cores,
    events_name,
    exposed_ports,
    health_of,
    open_standard_streams,
    parse_elastic,
    parse_hosts,
    remote_launchers,
    run_workers,
    script_command,
    share_token,
)


@click.command(cls=CommandWithFile, context_settings={"allow_interspersed_args": False})
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=read_file,
    help="A file with options.  [default: tfdist.toml, if it is there]",
)
@click.option("-n", "--workers", type=int, help="Total number of workers.  [default: 1]")
@click.option(
    "--ps",
    "servers",
    type=int,
    default=0,
    metavar="N",
    help="Total number of parameter servers. The script then runs on an additional chief.",
)
@click.option(
    "--synchronous",
    is_flag=True,
    help="With --ps: all workers compute parts of the same batch, as in other strategies.",
)
@click.option(
    "--hosts", metavar="H:N,...", help="The machines, and the number of workers on each."
)
@click.option(
    "--ssh",
    is_flag=True,
    help="With --hosts: start `tfdist run` on the other hosts too, with ssh.",
)
@click.option("--joined", is_flag=True, hidden=True, help="Set for the others by --ssh.")
@click.option("--node-rank", type=int, metavar="I", help="Index of this machine in --hosts.")
@click.option(
    "--port",
    type=int,
    default=DEFAULT_PORT,
    show_default=True,
    help="With --hosts: the port of worker 0. Worker k uses this port + k.",
)
@click.option(
    "--strategy",
    type=click.Choice(["auto", *strategy_names.names()]),
    help="The strategy.  [default: the script's choice, or auto]",
)
@click.option(
    "--zero",
    type=int,
    metavar="STAGE",
    help="1: each worker keeps only its part of the optimizer's state. 3: of the weights too.",
)
@click.option(
    "--mesh",
    metavar="AXES",
    help="Divide layers over workers, such as batch=2,model=2: each two workers compute them "
    "together.",
)
@click.option(
    "--drop-in",
    is_flag=True,
    help="Distribute the Model.fit of a script that does not import tfdist.",
)
@click.option(
    "--output",
    type=click.Choice(("chief", "all", "failed")),
    default="chief",
    show_default=True,
    help="Whose output to show. chief: the chief's, and on other hosts that of the first "
    "worker. failed: only that of workers that fail, which the others show too.",
)
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write the output of each worker to DIR/worker-<i>.log, and events of the run to "
    "DIR/events.jsonl. Logs of earlier starts are kept as worker-<i>.attempt-<k>.log.",
)
@click.option(
    "--max-restarts",
    metavar="N[/TIME]",
    help="Maximum number of restarts after failures; 3/10m: 3 in any 10 minutes.  "
    "[default: 0; 3 with --ps or --elastic]",
)
@click.option(
    "--elastic",
    metavar="MIN:MAX",
    help="Start MAX workers. If workers are lost, continue with at least MIN.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=SAVING_S,
    show_default=True,
    metavar="SECONDS",
    help="After SIGTERM: time in which workers with a checkpoint may save.",
)
@click.option(
    "--on-warning",
    type=click.Choice(("save", "end")),
    default="save",
    show_default=True,
    help="What SIGUSR1 and SIGUSR2, SLURM's warnings, do in a fit with checkpoints. save: "
    "training is saved and goes on. end: it is saved and ends, as after SIGTERM.",
)
@click.option(
    "--on-preempt-status",
    type=click.IntRange(min=0, max=255),
    default=START_ME_AGAIN,
    show_default=True,
    metavar="STATUS",
    help="Exit status that asks for the run to be started again.",
)
@click.option(
    "--health",
    metavar="PORT|FILE",
    help="Answer probes: at PORT by HTTP (/livez, /readyz), or in FILE, which is written anew "
    "every 5 s.",
)
@click.option(
    "--node-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=NODE_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="With --hosts and --max-restarts: time to wait for a host to start or come back.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Start no worker: predict each strategy for these workers, as `tfdist recommend`.",
)
@program("script", may_be_module=True)
def run(**values: Any) -> None:
    """Run SCRIPT in one or more worker processes.

    All arguments after SCRIPT are passed to the script. The workers of a machine share its
    cores and GPUs. The first failure ends all workers. With --max-restarts they are
    then started again, unless the same failure happens twice in a row at the same step. If the
    script calls `fit(..., checkpoint=...)`, training continues from its last checkpoint,
    SIGTERM saves and ends with status 75, and SIGUSR1 and SIGUSR2 save.

    \b
    Examples:
      tfdist run -n 2 train.py --epochs 5
      tfdist run -n 2 --ps 1 train.py      with a parameter server
      tfdist run -n 2 --max-restarts 5/1h train.py
      tfdist run --hosts node1:4,node2:4 --ssh train.py    on node1
      tfdist run --hosts node1:4,node2:4 --node-rank 0 train.py    on node1
      tfdist run --hosts node1:4,node2:4 --node-rank 1 train.py    on node2

    Exit status: 0 if every worker succeeded, else that of the worker that failed first
    (128 + n if signal n ended it). 75, or --on-preempt-status: start the run again, because
    training was saved after a signal or another worker was lost. 76: the run hung; a report
    says where each worker was. 130: Ctrl-C. 1: tfdist could not start the workers. 2: the
    command line is wrong.
    """  # noqa: D301
    open_standard_streams()
    options = RunOptions(**values)
    check_script(options.script, options.module)
    options.check()
    if options.explain:
        sys.exit(
            explain_run(
                options.program,
                options.module,
                options.workers,
                options.servers,
                options.hosts,
            )
        )
    os.environ.update(options.for_workers())  # the workers inherit them
    restart_limit = options.restart_limit()
    machines = parse_hosts(options.hosts) if options.hosts is not None else ()
    others = None
    if options.ssh:
        options = replace(options, node_rank=check_ssh(machines, options.node_rank))
        others = task_of(click.get_current_context(), can_return=restart_limit.count > 0)
    if options.strategy == "horovod":
        # For the secret of its ranks.
        share_token(machines, options.node_rank, options.node_timeout)
    roster = _roster(options, machines)
    check_names(machines)
    connection = _connection(options, machines, restart_limit, roster)
    journal = Journal(options.log_dir, events_name(roster.workers))
    with (
        health_of(journal, options.health),
        journal.ended_by_errors(),
        connection as client,
        remote_launchers(machines, others) as remotes,
    ):
        _warn(roster, options, has_coordinator=client is not None and options.node_rank == 0)
        outcome = _run(options, restart_limit, roster, client, journal)
        if remotes is not None and outcome.interrupted:
            remotes.close(INTERRUPTED_S)
    status = outcome.status
    if status == START_ME_AGAIN:
        status = options.on_preempt_status
    journal.note_end(status, outcome.what)
    explain_end(outcome, roster.workers, options.log_dir, has_other_hosts=len(machines) > 1)
    sys.exit(status)


def _roster(options: RunOptions, machines: Sequence[Host]) -> Roster:
    """Plans the workers that this machine starts."""
    return Roster(
        script_command(options.program, module=options.module),
        workers=options.workers,
        hosts=machines,
        node_rank=options.node_rank,
        elastic=None if options.elastic is None else parse_elastic(options.elastic),
        port=options.port,
        strategy=options.strategy,
        drop_in=options.drop_in,
        servers=options.servers,
    )


def _connection(
    options: RunOptions, machines: Sequence[Host], limit: RestartLimit, roster: Roster
) -> AbstractContextManager[CoordinatorClient | None]:
    """Connects the launchers of several machines, if they must agree on each restart."""
    is_restarted = options.asks_for_restarts and limit.count > 0
    if len(machines) < 2 or not (is_restarted or options.ssh or options.joined):
        return nullcontext()
    share_token(machines, options.node_rank, options.node_timeout)
    return connect_launchers(
        machines,
        options.node_rank or 0,
        options.port,
        os.environ[TOKEN],
        max_restarts=limit,
        limit=options.node_timeout,
        min_workers=None if roster.elastic is None else roster.elastic[0],
        strategy=options.strategy,
        ps=options.servers,
    )


def _warn(roster: Roster, options: RunOptions, has_coordinator: bool) -> None:
    """Warns of ports that others can reach, and of more workers than cores."""
    coordinator_port = options.port - 1 if has_coordinator else None
    if exposed := exposed_ports(roster.workers, coordinator_port):
        click.echo(exposed, err=True)
    if crowded := crowded_cores(count_on_processor(roster.workers)):
        click.echo(crowded, err=True)


def _run(
    options: RunOptions,
    limit: RestartLimit,
    roster: Roster,
    client: CoordinatorClient | None,
    journal: Journal,
) -> Outcome:
    """Runs the workers of this machine, from the first start to the end."""
    return run_workers(
        roster.workers,
        log_dir=options.log_dir,
        restarts=Restarts(limit, of_exceptions=options.asks_for_restarts),
        grace=options.grace,
        client=client,
        slots=roster.slots,
        plan=None if roster.elastic is None else roster.of_hosts,
        meeting=roster.meeting,
        shows=options.output,
        plan_again=roster.again,
        warnings_end=options.on_warning == "end",
        journal=journal,
    )
