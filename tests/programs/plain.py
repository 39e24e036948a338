"""A task of a place: a program in plain Keras."""

from __future__ import annotations

from pathlib import Path

from tests.programs.run import Left, run


def do(name: str, folder: Path) -> Left:
    return run(name, folder)
