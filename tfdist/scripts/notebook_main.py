"""The program of the workers that `tfdist.notebook_launcher` starts.

Its argument is a folder. It reads the function from there, calls it, and on the chief writes
what the function returns.
"""

from __future__ import annotations

import inspect
import io
import linecache
import os
import pickle
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

import cloudpickle
import keras

import tfdist
from tfdist.errors import ArgumentError
from tfdist.scripts.notebook import RESULT, TASK
from tfdist.training.callback_kinds import is_history


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Leaves the model out of a `History`: it is large, and a custom one cannot be pickled."""

    def reducer_override(self, value: Any) -> Any:
        if is_history(value):
            kept = {k: v for k, v in vars(value).items() if not _is_of_training(k, v)}
            return _history, (kept,)
        return super().reducer_override(value)


def _is_of_training(name: str, value: Any) -> bool:
    return name in ("model", "_model", "validation_data") or isinstance(value, keras.Model)


def _history(kept: dict[str, Any]) -> Any:
    history = keras.callbacks.History()
    for name, value in kept.items():
        setattr(history, name, value)
    return history


def read_task(folder: Path) -> tuple[Any, tuple[Any, ...]]:
    """Returns the function and its arguments, and lets tracebacks show lines of cells.

    Args:
        folder: The folder with the task.
    """
    paths, sources, cells, task = pickle.loads((folder / TASK).read_bytes())
    sys.path += [path for path in paths if path not in sys.path]
    linecache.cache.update(sources)
    function, args = pickle.loads(task)
    _name_cells(function, cells)
    return function, args


def _name_cells(function: Any, cells: Mapping[str, str]) -> None:
    named = {**getattr(function, "__globals__", {}), "": function}
    for name, cell in cells.items():
        if inspect.isfunction(named.get(name)):
            named[name].__code__ = _in_cell(named[name].__code__, cell)


def _in_cell(code: CodeType, cell: str) -> CodeType:
    inner = tuple(
        _in_cell(constant, cell) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_filename=cell, co_consts=inner)


def write_result(folder: Path, result: Any) -> None:
    """Writes what the function has returned.

    Args:
        folder: The folder.
        result: The value.

    Raises:
        ArgumentError: It cannot be pickled.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(result)
    except Exception as error:  # objects raise what they like
        raise ArgumentError(
            "What the function returns must be picklable. Received: a "
            f"{type(result).__name__}: {type(error).__name__}: {error}. Return numbers, "
            "arrays, the History or a compiled model."
        ) from None
    unfinished = folder / f"{RESULT}.tmp"
    unfinished.write_bytes(buffer.getvalue())
    os.replace(unfinished, folder / RESULT)


def show_error(
    kind: type[BaseException], error: BaseException, frames: TracebackType | None
) -> None:
    """Prints a traceback from the function on, with lines of cells. Python's own has none.

    Args:
        kind: As in `sys.excepthook`.
        error: The error.
        frames: Its traceback.
    """
    inner = frames
    while inner is not None and inner.tb_frame.f_code.co_filename == __file__:
        inner = inner.tb_next
    traceback.print_exception(kind, error, inner or frames)


def main() -> None:
    """Calls the function of the folder that the command line names."""
    sys.excepthook = show_error
    folder = Path(sys.argv[1])
    function, args = read_task(folder)
    result = function(*args)
    if tfdist.is_chief():
        write_result(folder, result)


if __name__ == "__main__":
    main()
