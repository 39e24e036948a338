"""`tfdist horovod`: builds and installs Horovod."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click


@click.group()
def horovod() -> None:
    """Build Horovod for the installed TensorFlow.

    \b
    Example:
      tfdist horovod build
    """  # noqa: D301


@horovod.command("build")
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="The folder of built wheels.  [default: TFDIST_CACHE_DIR, else ~/.cache/tfdist]",
)
@click.option("--force", is_flag=True, help="Build again even if there is a wheel.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Files to compile in parallel.  [default: as many as cores and memory allow]",
)
@click.option("--no-install", is_flag=True, help="Only build the wheel, and print its path.")
def build_horovod(
    cache_dir: Path | None, force: bool, jobs: int | None, no_install: bool
) -> None:
    """Build Horovod against the installed TensorFlow, install it and check it.

    The first build takes minutes. The wheel is kept for this version of Horovod, TensorFlow
    and Python. Horovod's own build options are read from the environment. You need compilers
    for C and C++, make, and the packages of `pip install "tfdist[horovod]"`.

    \b
    Examples:
      tfdist horovod build
      HOROVOD_GPU_OPERATIONS=NCCL tfdist horovod build    with NCCL, for GPUs

    Exit status: 0 if two processes could add their numbers with it, else 1; 130 after Ctrl-C.
    """  # noqa: D301
    from tfdist.launch.horovod_wheel.build import build, check, install

    try:
        wheel = build(cache_dir=cache_dir, force=force, jobs=jobs)
        if no_install:
            click.echo(wheel)
            return
        install(wheel)
        check(log_folder=wheel.parent)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(128 + signal.SIGINT)
