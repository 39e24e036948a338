"""A task of a place: a program under the drop-in, with no seed but its own."""

from __future__ import annotations

from pathlib import Path

import tfdist
from tests.programs.run import Left, run


def do(name: str, folder: Path) -> Left:
    tfdist.init()
    with tfdist.drop_in():
        return run(name, folder)
