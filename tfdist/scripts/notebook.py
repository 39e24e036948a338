"""`tfdist.notebook_launcher`: runs a function of a notebook on several local workers."""

from __future__ import annotations

import inspect
import io
import linecache
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, cast

from tfdist.errors import ArgumentError, LaunchError, MissingPackageError
from tfdist.launch import (
    Outcome,
    Shows,
    count_on_processor,
    crowded_cores,
    plan_workers,
    run_workers,
    script_command,
)

TASK, RESULT = "task.pickle", "result.pickle"
_STRATEGIES = (None, "auto", "single", "mirrored", "multi_worker")
_MAIN = "tfdist.scripts.notebook_main"


def notebook_launcher(
    function: Callable[..., Any],
    num_workers: int = 2,
    args: tuple[Any, ...] = (),
    *,
    strategy: str | None = None,
    output: Shows = "chief",
) -> Any:
    """Runs a function of a notebook on several workers of this machine.

    The workers are fresh processes, connected as those of `tfdist run -n`. So it does not
    matter whether the notebook has used TensorFlow already. Their output comes in the cell.
    Interrupting the cell ends them.

    Needs `pip install 'tfdist[notebook]'`. The function, its arguments and the variables of the
    notebook that it uses are pickled and copied to each worker: make datasets in the function,
    and read large data there. What the function changes stays in the workers: return it.

    Args:
        function: The function, which each worker calls. It trains with `tfdist.fit`.
        num_workers: Number of workers.
        args: Arguments of the function.
        strategy: As in `tfdist run --strategy`: "auto", "single", "mirrored" or
            "multi_worker"; None for the function's choice, or auto.
        output: Whose output to show: that of the "chief", of "all" workers, or only that of
            workers that "failed".

    Returns:
        What the function returns on worker 0. Keras's `History` comes without its model; a
        compiled model comes with its weights.

    Raises:
        ArgumentError: An argument cannot be used, or something cannot be pickled.
        MissingPackageError: cloudpickle is not installed.
        LaunchError: A worker failed. The message has its traceback.
        KeyboardInterrupt: The cell was interrupted.

    Example:
        >>> def train(epochs):  # doctest: +SKIP
        ...     import keras, tfdist
        ...     (x, y), _ = keras.datasets.mnist.load_data()
        ...     model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)])
        ...     model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
        ...     return tfdist.fit(model, x / 255.0, y, batch_size=256, epochs=epochs)
        >>> history = tfdist.notebook_launcher(train, args=(3,))  # doctest: +SKIP
        >>> history.history["loss"]  # doctest: +SKIP
    """
    _check(function, num_workers, args)
    _check_strategy(strategy)
    task = _pickled(function, args)
    with tempfile.TemporaryDirectory(prefix="tfdist-notebook-") as name:
        folder = Path(name)
        (folder / TASK).write_bytes(task)
        command = script_command((_MAIN, name), module=True)
        workers = plan_workers(command, workers=num_workers, strategy=strategy)
        if crowded := crowded_cores(count_on_processor(workers)):
            print(crowded)
        outcome = run_workers(workers, stream=cast(TextIO, _Cell()), shows=output)
        _check_outcome(outcome)
        return _result(folder)


class _Cell(io.TextIOBase):
    """The output of the cell.

    The file descriptor of a notebook's `sys.stdout` is that of the server's terminal: so this
    stream has none.
    """

    @property
    def encoding(self) -> str:  # type: ignore[override]  # that of TextIOBase is settable
        return "utf-8"

    def write(self, text: str) -> int:
        return sys.stdout.write(text)

    def flush(self) -> None:
        sys.stdout.flush()


def _check(function: Any, num_workers: Any, args: Any) -> None:
    if not callable(function):
        raise ArgumentError(
            "`function` must be a function. Received: "
            f"function={function!r}. Pass train, not train()."
        )
    is_number = isinstance(num_workers, int) and not isinstance(num_workers, bool)
    if not is_number or num_workers < 1:
        raise ArgumentError(
            "`num_workers` must be an int of at least 1. Received: "
            f"num_workers={num_workers!r}."
        )
    if not isinstance(args, tuple):
        raise ArgumentError(
            "`args` must be a tuple of arguments. Received: args of type "
            f"{type(args).__name__}. For one argument, write args=(value,)."
        )
    try:
        inspect.signature(function).bind(*args)
    except TypeError as error:
        raise ArgumentError(
            f"`args` must fit the function. Received: {len(args)} argument(s): {error}."
        ) from None
    except ValueError:  # a builtin without a signature
        pass


def _check_strategy(strategy: str | None) -> None:
    if strategy not in _STRATEGIES:
        names = ", ".join(repr(name) for name in _STRATEGIES)
        raise ArgumentError(
            f"`strategy` must be one of {names}. Received: strategy={strategy!r}. Write a "
            "script and start it with `tfdist run` for others."
        )


def _pickled(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickles what the workers need, each part by itself: the paths must come first."""
    cloudpickle = _cloudpickle()
    sources = {
        name: entry
        for name, entry in linecache.cache.items()
        if len(entry) == 4 and entry[1] is None  # of cells, which are no files
    }
    try:
        task = cloudpickle.dumps((function, args))
    except Exception as error:  # objects raise what they like
        raise ArgumentError(
            "The function, its arguments and the variables that it uses must be picklable. "
            f"Received: {_culprit(function, args, cloudpickle)}: {type(error).__name__}: "
            f"{error}. Make it in the function."
        ) from None
    return pickle.dumps((list(sys.path), sources, _cells_of(function, sources), task))


def _cells_of(function: Callable[..., Any], cells: Collection[str]) -> dict[str, str]:
    """Returns the cell of each function that tracebacks may show: pickling loses it.

    The name of `function` itself is empty.
    """
    others = getattr(function, "__globals__", {})
    named = {**others, "": function}
    return {
        name: value.__code__.co_filename
        for name, value in named.items()
        if inspect.isfunction(value) and value.__code__.co_filename in cells
    }


def _cloudpickle() -> ModuleType:
    try:
        import cloudpickle
    except ImportError:
        raise MissingPackageError(
            "notebook_launcher needs cloudpickle, which is not installed. "
            "Install it: pip install 'tfdist[notebook]'"
        ) from None
    module: ModuleType = cloudpickle
    return module


def _culprit(function: Any, args: tuple[Any, ...], cloudpickle: ModuleType) -> str:
    """Names what cannot be pickled."""
    for name, value in _parts(function, args):
        try:
            cloudpickle.dumps(value)
        except Exception:
            return f"{name}, a {type(value).__name__}"
    return f"function={getattr(function, '__name__', function)!r}"


def _parts(function: Any, args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for position, value in enumerate(args):
        yield f"args[{position}]", value
    if inspect.isfunction(function):
        used = inspect.getclosurevars(function)
        for name, value in {**used.globals, **used.nonlocals}.items():
            yield f"the variable {name!r}", value


def _result(folder: Path) -> Any:
    try:
        content = (folder / RESULT).read_bytes()
    except FileNotFoundError:
        raise LaunchError(
            "The function must return. Received: worker 0 ended before, with exit status 0. "
            "Remove sys.exit() from the function."
        ) from None
    return pickle.loads(content)


def _check_outcome(outcome: Outcome) -> None:
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.failure is None:
        return
    lines = os.linesep.join(outcome.failure.excerpt())
    raise LaunchError(
        f"All workers must end without an error. Received: {outcome.failure.describe()} "
        f"Its last lines:\n\n{lines}"
    )
