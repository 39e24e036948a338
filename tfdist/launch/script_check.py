"""Refuses a script that cannot run, before its workers wait for TensorFlow's import."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import traceback
import warnings
import zipfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from tfdist.errors import LaunchError

_MAIN = "__main__"


def find_script(script: str, module: bool = False) -> Path | None:
    """Finds a script. None of its code runs.

    Args:
        script: The file, or with `module` the name of a module, as after `python -m`.
        module: Whether it is a module.

    Returns:
        The file; None for a module whose file cannot be told before it runs.

    Raises:
        LaunchError: There is no such file or module.
    """
    if module:
        return _file_of_module(script)
    if not Path(script).is_file():
        raise LaunchError(
            f"SCRIPT must be a Python file. Received: {script!r}, which is "
            f"{'no file' if Path(script).exists() else 'not there'}. "
            "Check the path; the options of `tfdist run` come before it."
        )
    return Path(script)


def check_syntax(path: Path) -> None:
    """Refuses a file that Python cannot read. None of its code runs.

    Args:
        path: The script.

    Raises:
        LaunchError: The file has a syntax error, or you may not read it.
    """
    name = str(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise LaunchError(
            "SCRIPT must be a file that you may read. Received: "
            f"{name!r} ({error.strerror}). Check its permissions."
        ) from None
    if source.startswith(importlib.util.MAGIC_NUMBER) or zipfile.is_zipfile(path):
        return  # compiled already, or an archive, which Python runs too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the worker shows them
            compile(source, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        version = ".".join(map(str, sys.version_info[:2]))
        lines = "".join(traceback.format_exception_only(error)).rstrip()
        raise LaunchError(
            f"SCRIPT must be a program that Python {version} can read. Received:\n{lines}"
        ) from None
    except (RecursionError, MemoryError):
        return  # Python itself may have more room for it


def _file_of_module(name: str) -> Path | None:
    """Finds the file that `python -m` would run; None if that cannot be told from here."""
    path_before = list(sys.path)
    if not sys.flags.safe_path:
        # The worker's, which has the working directory in place of this program's folder.
        sys.path[0] = os.getcwd()
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    try:
        spec = _find(name)
    except KeyError:  # a namespace in a namespace asks for the imported outer one
        return None
    finally:
        sys.path[:] = path_before
    if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
        return None
    return Path(spec.loader.path)


def _find(name: str) -> ModuleSpec | None:
    """Finds a module without the import of its packages, which could import TensorFlow."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        return None
    found = top
    if spec is None:
        raise _missing(name, f"there is no module {top!r}")
    for part in rest:
        locations, inner = list(spec.submodule_search_locations or ()), f"{found}.{part}"
        if not locations:
            raise _missing(name, f"{found!r} is no package")
        child = _find_in(inner, locations)
        if child is None:
            if _may_find_more(spec):
                return None
            raise _missing(name, f"there is no module {inner!r}")
        spec, found = child, inner
    if not spec.submodule_search_locations:
        return spec
    main = _find_in(f"{found}.{_MAIN}", list(spec.submodule_search_locations))
    if main is None and not _may_find_more(spec):
        raise _missing(name, f"{found!r} is a package without a module {_MAIN}")
    return main


def _find_in(name: str, locations: Sequence[str]) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, locations)
        except (ImportError, AttributeError):
            continue
        if spec is not None:
            return spec
    return None


def _may_find_more(package: ModuleSpec) -> bool:
    """Returns whether a package may add modules or folders while it is imported."""
    if not isinstance(package.loader, importlib.machinery.SourceFileLoader):
        return package.origin is not None  # a namespace has no code
    try:
        code = Path(package.loader.path).read_bytes()
    except OSError:
        return True
    return b"__path__" in code or b"sys.modules" in code or b"meta_path" in code


def _missing(name: str, reason: str) -> LaunchError:
    return LaunchError(
        f"SCRIPT must be a module that Python finds, since -m is given. Received: -m {name}, "
        f"but {reason}. Check the name. Start in the folder of its package, or set PYTHONPATH."
    )
