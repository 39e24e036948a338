"""Builds Horovod's wheel against the installed TensorFlow, installs it and checks it."""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from tfdist.cluster.cache import cache_folder
from tfdist.errors import BuildError
from tfdist.launch.horovod_wheel.recipe import (
    HOROVOD,
    Recipe,
    cached_wheel,
    check_tools,
    jobs_for_here,
    minutes,
    recipe_for_here,
    search_path,
)
from tfdist.launch.horovod_wheel.source import change_source
from tfdist.launch.horovod_wheel.steps import StepRunner, step_runner, store_file

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
    """Builds Horovod's wheel for this interpreter and its TensorFlow, or finds it in the cache.

    Args:
        cache_dir: The cache folder; by default TFDIST_CACHE_DIR, XDG_CACHE_HOME/tfdist or
            ~/.cache/tfdist.
        force: Whether to build the wheel even if the cache has it.
        jobs: How many files to compile at once; None for as many as cores and memory allow.
        console: The console for the progress; standard error by default.
        environ: The environment variables, which may hold Horovod's own build options.

    Returns:
        The wheel.

    Raises:
        BuildError: A tool or package is missing, or the build failed; it shows the cause.

    Example:
        >>> wheel = build()  # doctest: +SKIP
    """
    console = console or _standard_error()
    recipe = recipe_for_here(environ)
    folder = cache_folder(cache_dir, environ) / "horovod" / recipe.key
    wheel = cached_wheel(folder)
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
    with step_runner(
        console, _build_environment(recipe, environ, path, jobs), folder
    ) as runner:
        wheel = store_file(_compile(runner, recipe), folder)
    minutes_taken, seconds_taken = divmod(round(time.monotonic() - began), 60)
    _say(console, f"Built in {minutes_taken} min {seconds_taken} s.")
    return wheel


def install(
    wheel: Path,
    *,
    console: Console | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Installs a wheel into this interpreter's environment, with Horovod's requirements.

    Args:
        wheel: The wheel that `build` returned.
        console: The console for the progress; standard error by default.
        environ: The environment variables.

    Raises:
        BuildError: pip failed.
    """
    console = console or _standard_error()
    with step_runner(console, environ, wheel.parent) as runner:
        runner.display.begin("Installing")
        # Otherwise pip would keep an installed wheel of this version for another TensorFlow.
        replace = ("install", "--force-reinstall", "--no-deps", str(wheel))
        runner.run((*_PIP, *replace), "Installing Horovod", _INSTALL_S)
        requirements = ("install", f"horovod=={HOROVOD}")
        runner.run((*_PIP, *requirements), "Installing what Horovod requires", _INSTALL_S)
    _say(console, f"Installed into {sys.prefix}.")


def check(
    *,
    console: Console | None = None,
    log_folder: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Checks the installed Horovod: two processes sum their numbers.

    Args:
        console: The console for the result; standard error by default.
        log_folder: The folder for the processes' output if they fail.
        environ: The environment variables.

    Raises:
        BuildError: The processes did not end within two minutes, or their sum is wrong.
    """
    console = console or _standard_error()
    # Variables of another run, or this machine's GPUs, would change the check.
    variables = {
        n: v for n, v in environ.items() if not n.startswith(("HOROVOD_", "TF_CONFIG"))
    }
    variables |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    transport = (
        ("MPI", "--mpi") if environ.get("HOROVOD_WITHOUT_GLOO") == "1" else ("Gloo", "--gloo")
    )
    with step_runner(console, variables, log_folder) as runner:
        runner.display.begin("Checking")
        program = runner.folder / "all_reduce.py"
        program.write_text(_ALL_REDUCE)
        launch = (sys.executable, "-m", "horovod.runner.launch", transport[1], "-np", "2")
        command = (*launch, "-H", "localhost:2", sys.executable, str(program))
        try:
            runner.run(command, "The all-reduce of two processes", _CHECK_S)
        except BuildError:
            # If Horovod cannot be imported, its launcher only reports that it has no Gloo.
            load = (sys.executable, "-c", "import horovod.tensorflow")
            runner.run(load, "Importing Horovod", _CHECK_S)
            raise
    _say(console, f"It works: two processes summed 1 + 2 = 3 over {transport[0]}.")


def _compile(runner: StepRunner, recipe: Recipe) -> Path:
    runner.display.begin("Downloading")
    # Only Horovod must come as source; the packages for its setup may come as wheels.
    source = ("--no-deps", "--no-build-isolation", "--no-binary", "horovod")
    download = ("download", *source, "-d", "sdist", f"horovod=={recipe.horovod}")
    runner.run((*_PIP, *download), f"Downloading Horovod {recipe.horovod}", _DOWNLOAD_S)
    tree = _unpack(next((runner.folder / "sdist").iterdir()), runner.folder)
    change_source(tree)
    runner.display.begin("Configuring")
    # pip would keep a second copy of the wheel, under this folder's name.
    wheel = ("wheel", "-v", "--no-cache-dir", "--no-deps", "--no-build-isolation")
    out = runner.folder / "wheel"
    runner.run((*_PIP, *wheel, "-w", str(out), "."), "Building Horovod", _BUILD_S, cwd=tree)
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
    # If a make called tfdist, these variables would bring that make's number of jobs.
    variables = {n: v for n, v in environ.items() if n not in ("MAKELEVEL", "MFLAGS")}
    return {
        **variables,
        **recipe.environment,
        "PATH": path,
        "MAKEFLAGS": f"-j{jobs}",
        # setup.py hands options to make.
        "CMAKE_GENERATOR": "Unix Makefiles",
        # Gloo asks for compatibility with a CMake so old that CMake 4 refuses.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        # The search for a failure's cause expects English messages.
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
    # Standard output has only the wheel's path.
    return Console(stderr=True, highlight=False)


def _say(console: Console, text: str) -> None:
    # Brackets or a narrow terminal must not change a path.
    console.print(text, markup=False, soft_wrap=True)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
