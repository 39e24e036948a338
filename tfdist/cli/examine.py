"""`tfdist recommend` and `tfdist estimate`: answers before a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import click

from tfdist.cli.target import check_target, program
from tfdist.launch import is_start_up_noise, parse_hosts

_SETTINGS = {"allow_interspersed_args": False}


@click.command(context_settings=_SETTINGS)
@click.option(
    "-n", "--workers", type=click.IntRange(min=1),
    help="Number of workers.  [default: any that this machine has devices for]",
)  # fmt: skip
@click.option(
    "--hosts", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="Number of machines like this one.",
)  # fmt: skip
@click.option(
    "--ps", "servers", type=click.IntRange(min=0), default=0, metavar="N",
    help="Number of parameter servers.",
)  # fmt: skip
@click.option(
    "--link", metavar="RATE",
    help="Rate of the network between hosts, such as 1gbit.  [default: as `tfdist test` has "
    "measured, or 1gbit]",
)  # fmt: skip
@click.option("-b", "--batch-size", type=click.IntRange(min=1), help="Instead of the script's.")
@click.option("--no-measure", is_flag=True, help="Predict from FLOPs; time no step here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@program("target", may_be_module=True)
def recommend(
    workers: int | None,
    hosts: int,
    servers: int,
    link: str | None,
    batch_size: int | None,
    no_measure: bool,
    as_json: bool,
    module: bool,
    target: str,
    arguments: tuple[str, ...],
) -> None:
    """Recommend a strategy for TARGET, and say why.

    TARGET is a script, which runs up to its first fit and trains nothing, a .keras file, or
    module:function, which returns a compiled model, or a tuple (model, x, y).

    \b
    Examples:
      tfdist recommend train.py --epochs 5
      tfdist recommend -n 8 --hosts 2 --link 10gbit train.py
      tfdist recommend --json model.keras

    Exit status: 0 if there is an answer, else 1; 2 for a wrong command line.
    """  # noqa: D301
    check_target(target, module)
    sys.exit(
        ask(
            "recommend",
            (*(("-m",) if module else ()), target, *arguments),
            as_json=as_json,
            workers=workers,
            hosts=hosts,
            servers=servers,
            link=link,
            batch_size=batch_size,
            measure=not no_measure,
        )
    )


@click.command(context_settings=_SETTINGS)
@click.option(
    "-n", "--replicas", type=click.IntRange(min=1), default=8, show_default=True,
    help="The largest number of replicas.",
)  # fmt: skip
@click.option("-b", "--batch-size", type=click.IntRange(min=1), help="Of all replicas.")
@click.option(
    "--dtype", type=click.Choice(("float32", "bfloat16", "both")), default="float32",
    show_default=True, help="bfloat16: mixed precision, whose weights are float32.",
)  # fmt: skip
@click.option(
    "--memory", metavar="SIZE",
    help="What a worker may use, such as 16GiB.  [default: that of a GPU or machine here]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@program("target", may_be_module=False)
def estimate(
    replicas: int,
    batch_size: int | None,
    dtype: str,
    memory: str | None,
    as_json: bool,
    target: str,
    arguments: tuple[str, ...],
) -> None:
    """Estimate the memory of a worker that trains TARGET, without training.

    TARGET is as in `tfdist recommend`. Functions of keras.applications work too.

    \b
    Examples:
      tfdist estimate train.py
      tfdist estimate -b 256 --memory 16GiB --dtype both keras.applications:ResNet50

    Exit status: 0 if there is an answer, else 1; 2 for a wrong command line.
    """  # noqa: D301
    check_target(target, module=False)
    dtypes = ["float32", "bfloat16"] if dtype == "both" else [dtype]
    sys.exit(
        ask(
            "estimate",
            (target, *arguments),
            as_json=as_json,
            replicas=replicas,
            batch_size=batch_size,
            dtypes=dtypes,
            memory=memory,
        )
    )


def ask(what: str, target: tuple[str, ...], *, as_json: bool = False, **options: Any) -> int:
    """Asks in a process of its own, as TensorFlow is needed, and the script runs there.

    Args:
        what: "recommend" or "estimate".
        target: The target and its arguments.
        as_json: Whether JSON is printed.
        **options: Of the command.

    Returns:
        The exit status.
    """
    question = json.dumps({"what": what, "json": as_json, **options})
    environ = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
    command = [sys.executable, "-m", "tfdist.scripts.examine_main", question, *target]
    with subprocess.Popen(
        command, env=environ, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if not is_start_up_noise(line):
                print(line, end="", file=sys.stderr, flush=True)
    return process.returncode


def explain_run(
    script: tuple[str, ...], module: bool, workers: int | None, servers: int, hosts: str | None
) -> int:
    """Answers `tfdist run --explain`.

    Args:
        script: The script and its arguments.
        module: Whether it is a module.
        workers: As in `tfdist run`.
        servers: As in `tfdist run`.
        hosts: As in `tfdist run`.

    Returns:
        The exit status.
    """
    machines = () if hosts is None else parse_hosts(hosts)
    return ask(
        "recommend",
        (*(("-m",) if module else ()), *script),
        workers=workers or sum(machine.slots for machine in machines) or None,
        hosts=max(1, len(machines)),
        servers=servers,
        link=None,
        batch_size=None,
        measure=True,
    )
