"""Runs a program to its end in this process, and gives what it left behind."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

SCRIPTS = Path(__file__).parent / "scripts"
Left = dict[str, np.ndarray]


def left_in(folder: Path) -> list[Left]:
    """Gives what each process that ran a program left in a folder."""
    found = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as arrays:
            found.append(dict(arrays))
    return found


def run(name: str, folder: Path) -> Left:
    """Runs one program as `python` would, with a folder to work in.

    Args:
        name: That of its file.
        folder: The same on all workers.
    """
    own = folder / f"outcome-{os.getpid()}"
    own.mkdir()
    script = SCRIPTS / f"{name}.py"
    with _as_of_a_new_process(folder, own):
        runpy.run_path(str(script), run_name="__main__")
    (left,) = left_in(own)
    return left


@contextlib.contextmanager
def _as_of_a_new_process(folder: Path, own: Path) -> Iterator[None]:
    """Gives a program what it would have of its own, and takes back what it set."""
    before = Path.cwd()
    os.environ["OUTCOME"] = str(own)
    sys.path.insert(0, str(SCRIPTS))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(SCRIPTS))
        del os.environ["OUTCOME"]
        keras.config.set_dtype_policy("float32")
        tf.config.run_functions_eagerly(False)
