"""What determines a wheel of Horovod, its place in the cache, and the tools for the build."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tfdist.errors import BuildError
from tfdist.launch.horovod_wheel.source import CHANGES_KEY
from tfdist.launch.resources import usable_cores

# The last release. The changes to its source were tested with this release only.
HOROVOD = "0.28.1"

_TENSORFLOWS = (
    "tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-rocm", "tensorflow-macos",
    "intel-tensorflow", "tf-nightly", "tf-nightly-cpu",
)  # fmt: skip
# Only build options: Horovod's other variables, which it reads while it trains, do not count.
_OPTION = re.compile(
    r"HOROVOD_(?:WITH_|WITHOUT_|GPU|CUDA_HOME$|ROCM_HOME$|NCCL_(?:HOME|INCLUDE|LIB|LINK)$"
    r"|NVTX_INCLUDE$|BUILD_|CPU_OPERATIONS$|ALLOW_MIXED_GPU_IMPL$|DEBUG$|LOCAL_VERSION$)"
)
_NO_TENSORFLOW = ("HOROVOD_WITHOUT_TENSORFLOW", "HOROVOD_SKIP_COMPILE")
_OFF_BY_DEFAULT = ("PYTORCH", "MXNET", "MPI")

_OLDEST_CMAKE = (3, 13)
_PROBE = b"#include <string_view>\nint main() { return std::string_view().size() != 0; }\n"
_PROBE_S = 60
# The largest compiler process used 1.24 GB.
_JOB_BYTES = 5 * 2**28
# Minutes on one core, measured with TensorFlow 2.21 and GCC 12: parallel and serial work.
_PARALLEL_MIN, _SERIAL_MIN = 5.0, 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a wheel: two equal recipes give the same wheel.

    Attributes:
        tensorflow: TensorFlow's version.
        package: The name of the package that installed TensorFlow.
        python: Python's tag, such as "cp311".
        platform: The system, the processor and the C library.
        options: The HOROVOD_* variables that the user set for the build, sorted.
        horovod: Horovod's version.
        changes: A hash of the changes to Horovod's source.
    """

    tensorflow: str
    package: str
    python: str
    platform: str
    options: tuple[tuple[str, str], ...] = ()
    horovod: str = HOROVOD
    changes: str = CHANGES_KEY

    @property
    def key(self) -> str:
        """The name of the wheel's folder in the cache."""
        package = f"{self.package}-{self.tensorflow}"
        parts = [self.horovod, self.changes, package, self.python, self.platform]
        if self.options:
            parts.append(hashlib.sha256(repr(self.options).encode()).hexdigest()[:12])
        return "_".join(re.sub(r"[^\w.+-]", "-", part) for part in parts)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that tell Horovod what to build; the user's options come first."""
        options = dict(self.options)
        defaults = {"HOROVOD_WITH_TENSORFLOW": "1"}
        for name in _OFF_BY_DEFAULT:
            if options.get(f"HOROVOD_WITH_{name}") != "1":
                defaults[f"HOROVOD_WITHOUT_{name}"] = "1"
        return {**defaults, **options}

    def describe(self) -> str:
        """Returns what is built, in words."""
        version = f"{self.python[2]}.{self.python[3:]}"
        options = "".join(f", {name}={value}" for name, value in self.options)
        versions = f"TensorFlow {self.tensorflow}, Python {version}"
        return f"Horovod {self.horovod} for {versions}{options}"


def recipe_for_here(environ: Mapping[str, str]) -> Recipe:
    """Makes the recipe for this interpreter, its TensorFlow and the user's options.

    Args:
        environ: The environment variables, which may hold Horovod's build options.

    Returns:
        The recipe.

    Raises:
        BuildError: TensorFlow is not installed, or an option leaves it out.
    """
    for name in _NO_TENSORFLOW:
        if environ.get(name) == "1":
            raise BuildError(
                "Horovod must be built with TensorFlow. "
                f"Received: {name}=1 in the environment. Unset {name}."
            )
    package, version = _tensorflow()
    options = {n: value for n, value in environ.items() if _OPTION.match(n) and value}
    libc = "".join(platform.libc_ver())
    return Recipe(
        tensorflow=version,
        package=package,
        python=f"cp{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}",
        platform="-".join(filter(None, (sysconfig.get_platform(), libc))),
        options=tuple(sorted(options.items())),
    )


def cached_wheel(folder: Path) -> Path | None:
    """Returns the wheel in a folder of the cache; None if there is no intact one.

    Args:
        folder: The recipe's folder.
    """
    intact_wheels = (
        wheel for wheel in folder.glob("horovod-*.whl") if zipfile.is_zipfile(wheel)
    )
    return max(intact_wheels, default=None)


def search_path(environ: Mapping[str, str]) -> str:
    """Returns PATH, with the programs of this interpreter's environment first.

    Args:
        environ: The environment variables.
    """
    own_folders = (str(Path(sys.executable).parent), sysconfig.get_path("scripts"))
    return os.pathsep.join(filter(None, (*dict.fromkeys(own_folders), environ.get("PATH"))))


def check_tools(environ: Mapping[str, str], path: str) -> None:
    """Checks for all tools of the build, so that it does not fail after minutes.

    Args:
        environ: The environment variables; CC, CXX and HOROVOD_CMAKE may name the tools.
        path: The folders with programs, as in PATH.

    Raises:
        BuildError: Tools are missing or too old; the message names all of them.
    """
    missing = [_cmake_problem(environ, path), *_compiler_problems(environ, path)]
    if _which(path, "gmake", "make") is None:
        missing.append("make")
    modules = [n for n in ("setuptools", "wheel") if importlib.util.find_spec(n) is None]
    missing += [f"the Python package {name}" for name in modules]
    problems = [problem for problem in missing if problem]
    if not problems:
        return
    remedies = []
    if missing[0] or modules:
        remedies.append(
            '`pip install "tfdist[horovod]"` brings CMake, setuptools and wheel into this '
            "environment."
        )
    if set(problems) - {missing[0]} - {f"the Python package {name}" for name in modules}:
        remedies.append(
            "The compilers and make come with the system: `apt install g++ make` on Debian "
            "and Ubuntu, `dnf install gcc-c++ make` on Fedora."
        )
    raise BuildError(
        "Building Horovod must find CMake 3.13 or newer, compilers for C and C++17, make, "
        f"setuptools and wheel. Received: no {', no '.join(problems)}. {' '.join(remedies)}"
    )


def jobs_for_here() -> int:
    """Returns how many files to compile at once: one a core if the memory is large enough."""
    return max(1, min(usable_cores(), _memory() // _JOB_BYTES))


def minutes(jobs: int) -> int:
    """Estimates how long a build takes.

    Args:
        jobs: How many files are compiled at once.

    Returns:
        Minutes, rounded up.
    """
    return math.ceil(_SERIAL_MIN + _PARALLEL_MIN / jobs)


def _tensorflow() -> tuple[str, str]:
    for name in _TENSORFLOWS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise BuildError(
        "Horovod is built against the installed TensorFlow, so TensorFlow must be installed. "
        f"Received: none of {', '.join(_TENSORFLOWS)} in the environment of {sys.executable}. "
        "Install it first: `pip install tensorflow`."
    )


def _which(path: str, *names: str) -> str | None:
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def _cmake_problem(environ: Mapping[str, str], path: str) -> str:
    program = _which(path, environ.get("HOROVOD_CMAKE") or "cmake")
    if program is None:
        return "cmake"
    try:
        output = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_PROBE_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return f"cmake that runs ({program} does not)"
    version = re.search(r"version (\d+)\.(\d+)", output)
    if version is None or tuple(map(int, version.groups())) < _OLDEST_CMAKE:
        return f"cmake 3.13 ({program} is {version[0] if version else 'unknown'})"
    return ""


def _compiler_problems(environ: Mapping[str, str], path: str) -> list[str]:
    problems = []
    # In CMake's order.
    cc = shlex.split(environ.get("CC", "")) or [_which(path, "cc", "gcc", "clang") or ""]
    cxx = shlex.split(environ.get("CXX", "")) or [_which(path, "c++", "g++", "clang++") or ""]
    if _which(path, cc[0]) is None:
        problems.append(f"C compiler ({cc[0] or 'cc, gcc or clang'})")
    if _which(path, cxx[0]) is None:
        problems.append(f"C++ compiler ({cxx[0] or 'c++, g++ or clang++'})")
        return problems
    command = [*cxx, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    try:
        subprocess.run(
            command, input=_PROBE, capture_output=True, timeout=_PROBE_S, check=True,
            env={**environ, "PATH": path},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        problems.append(f"compiler that knows C++17 ({cxx[0]} fails)")
    return problems


def _memory() -> int:
    """Returns how many bytes this process may still use, as far as the system knows."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        limits += [int(available[1]) * 1024] if available else []
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        # Not Linux, or the container has no limit ("max").
        pass
    return min(limits)
