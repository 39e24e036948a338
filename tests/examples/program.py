"""Runs an example to its end where it is, and gives what it printed."""

from __future__ import annotations

import contextlib
import io
import runpy
import shlex
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def do(command: str, folder: Path) -> str:
    """Runs the script that a command names, with its arguments; FOLDER is one of its own."""
    script, *arguments = shlex.split(command.replace("FOLDER", shlex.quote(str(folder))))
    before = sys.argv
    sys.argv = [str(EXAMPLES / script), *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before
    return printed.getvalue()
