"""Builds Horovod's wheel against the installed TensorFlow, installs it and tries it."""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from tfdist.errors import BuildError
from tfdist.launch.horovod_wheel.recipe import (
    HOROVOD,
    Recipe,
    cache_folder,
    check_tools,
    jobs_for_here,
    kept_wheel,
    minutes,
    recipe_for_here,
    search_path,
)
from tfdist.launch.horovod_wheel.source import change_source
from tfdist.launch.horovod_wheel.steps import Workshop, keep, workshop

_DOWNLOAD_S = 600
_BUILD_S = 3600
_INSTALL_S = 600
_CHECK_S = 120

_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
_ALL_REDUCE = """
import tensorflow as tf
import horovod.tensorflow as hvd

hvd.init()
total = hvd.allreduce(tf.constant([hvd.rank() + 1.0]), op=hvd.Sum)
if hvd.size() != 2 or float(total[0]) != 3.0:
    raise ValueError(f"{hvd.size()} processes summed 1 + 2 = {float(total[0]):g}")
"""


def build(
    *,
    cache_dir: Path | None = None,
    force: bool = False,
    jobs: int | None = None,
    console: Console | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """Builds the wheel of Horovod for this interpreter and its TensorFlow, or finds it built.

    Args:
        cache_dir: Where to keep it; else TFDIST_CACHE_DIR, XDG_CACHE_HOME/tfdist or
            ~/.cache/tfdist.
        force: Whether to build it although it is there.
        jobs: How many files to compile at once; as many as cores and memory allow if None.
        console: Where to show the progress; standard error unless given.
        environ: The variables; Horovod's own build options among them are respected.

    Returns:
        The wheel.

    Raises:
        BuildError: Something needed is missing, or the build failed; it shows the cause.

    Example:
        >>> wheel = build()  # doctest: +SKIP
    """
    console = console or _standard_error()
    recipe = recipe_for_here(environ)
    folder = cache_folder(cache_dir, environ) / "horovod" / recipe.key
    wheel = kept_wheel(folder)
    if wheel is not None and not force:
        _say(console, f"{recipe.describe()}: already built, the wheel is in {folder}")
        return wheel
    _check_writable(folder)
    path = search_path(environ)
    check_tools(environ, path)
    jobs = jobs or jobs_for_here()
    estimate, cores = _counted(minutes(jobs), "minute"), _counted(jobs, "core")
    _say(
        console,
        f"Building {recipe.describe()}: about {estimate} on {cores}, once; "
        f"the wheel is kept in {folder}",
    )
    began = time.monotonic()
    with workshop(console, _build_environment(recipe, environ, path, jobs), folder) as shop:
        wheel = keep(_compile(shop, recipe), folder)
    took_min, took_s = divmod(round(time.monotonic() - began), 60)
    _say(console, f"Built in {took_min} min {took_s} s.")
    return wheel


def install(
    wheel: Path,
    *,
    console: Console | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Installs a wheel into this interpreter's environment, with what Horovod requires.

    Args:
        wheel: What `build` returned.
        console: Where to show the progress; standard error unless given.
        environ: The variables.

    Raises:
        BuildError: pip failed.
    """
    console = console or _standard_error()
    with workshop(console, environ, wheel.parent) as shop:
        shop.display.begin("Installing")
        # Without it pip keeps a wheel of the same version, built for another TensorFlow.
        replace = ("install", "--force-reinstall", "--no-deps", str(wheel))
        shop.run((*_PIP, *replace), "Installing Horovod", _INSTALL_S)
        requirements = ("install", f"horovod=={HOROVOD}")
        shop.run((*_PIP, *requirements), "Installing what Horovod requires", _INSTALL_S)
    _say(console, f"Installed into {sys.prefix}.")


def check(
    *,
    console: Console | None = None,
    log_folder: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Lets two processes of the installed Horovod sum their numbers.

    Args:
        console: Where to show the result; standard error unless given.
        log_folder: Where to keep the processes' output if they fail.
        environ: The variables.

    Raises:
        BuildError: They did not end within two minutes, or did not arrive at the right sum.
    """
    console = console or _standard_error()
    # What belongs to another run, or to this machine's GPUs, would change what is checked.
    quiet = {n: v for n, v in environ.items() if not n.startswith(("HOROVOD_", "TF_CONFIG"))}
    quiet |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    over = (
        ("MPI", "--mpi") if environ.get("HOROVOD_WITHOUT_GLOO") == "1" else ("Gloo", "--gloo")
    )
    with workshop(console, quiet, log_folder) as shop:
        shop.display.begin("Checking")
        program = shop.folder / "all_reduce.py"
        program.write_text(_ALL_REDUCE)
        launch = (sys.executable, "-m", "horovod.runner.launch", over[1], "-np", "2")
        command = (*launch, "-H", "localhost:2", sys.executable, str(program))
        try:
            shop.run(command, "The all-reduce of two processes", _CHECK_S)
        except BuildError:
            # Where it cannot be imported, its launcher only says that it has no Gloo.
            load = (sys.executable, "-c", "import horovod.tensorflow")
            shop.run(load, "Importing Horovod", _CHECK_S)
            raise
    _say(console, f"It works: two processes summed 1 + 2 = 3 over {over[0]}.")


def _compile(shop: Workshop, recipe: Recipe) -> Path:
    shop.display.begin("Downloading")
    # Only Horovod comes as source: what its setup needs may come as it likes.
    source = ("--no-deps", "--no-build-isolation", "--no-binary", "horovod")
    download = ("download", *source, "-d", "sdist", f"horovod=={recipe.horovod}")
    shop.run((*_PIP, *download), f"Downloading Horovod {recipe.horovod}", _DOWNLOAD_S)
    tree = _unpack(next((shop.folder / "sdist").iterdir()), shop.folder)
    change_source(tree)
    shop.display.begin("Configuring")
    # pip would keep a second copy of the wheel, under this folder's name.
    wheel = ("wheel", "-v", "--no-cache-dir", "--no-deps", "--no-build-isolation")
    out = shop.folder / "wheel"
    shop.run((*_PIP, *wheel, "-w", str(out), "."), "Building Horovod", _BUILD_S, cwd=tree)
    return next(out.glob("horovod-*.whl"))


def _unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        # The first releases of Python 3.11 have no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(folder)
    return folder / sdist.name.removesuffix(".tar.gz")


def _build_environment(
    recipe: Recipe, environ: Mapping[str, str], path: str, jobs: int
) -> dict[str, str]:
    # Those of a make that called tfdist would bring its own jobs.
    ours = {n: v for n, v in environ.items() if n not in ("MAKELEVEL", "MFLAGS")}
    return {
        **ours,
        **recipe.environment,
        "PATH": path,
        "MAKEFLAGS": f"-j{jobs}",
        # setup.py hands options to make.
        "CMAKE_GENERATOR": "Unix Makefiles",
        # Gloo asks for a CMake so old that CMake 4 refuses it.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        # The causes of failures are looked for in English.
        "LC_ALL": "C",
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BuildError(
            f"The folder for the wheel must be writable. Received: {folder} "
            f"({error.strerror}). Choose another with `--cache-dir` or TFDIST_CACHE_DIR."
        ) from None


def _standard_error() -> Console:
    # Standard output is for the wheel's path alone.
    return Console(stderr=True, highlight=False)


def _say(console: Console, text: str) -> None:
    # Neither brackets nor narrow terminals may change a path.
    console.print(text, markup=False, soft_wrap=True)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
