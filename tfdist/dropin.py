"""Runs an unmodified Keras script distributed: its `fit` becomes tfdist's."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import keras

from tfdist import training
from tfdist.session import current


class DropIn(contextlib.AbstractContextManager["DropIn"]):
    """What `drop_in` replaced; leaving it as a context, or `undo`, puts Keras's own back."""

    def __init__(self, replaced: dict[str, Any]) -> None:
        self._replaced = replaced

    def undo(self) -> None:
        """Puts Keras's own methods back; doing so twice does no harm."""
        for name, method in self._replaced.items():
            if method is None:
                delattr(keras.Model, name)
            else:
                setattr(keras.Model, name, method)
        self._replaced = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def drop_in(strategy: Any = "auto") -> DropIn:
    """Makes every `keras.Model` train, evaluate and predict with tfdist.

    A script's own `model.fit(...)` then runs on all replicas, its `batch_size` being the
    global one. On several workers, saving a model writes to a temporary file that takes its
    name when it is complete: the workers hold the same weights, so whoever comes last
    leaves the same file, and nobody reads half of one.

    Args:
        strategy: As in `tfdist.fit`.

    Returns:
        A handle with `undo()`, which is a context manager too.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> with tfdist.drop_in():
        ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        ...     model.compile(loss="mse")
        ...     history = model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
        >>> len(history.history["loss"])
        1
    """
    methods: dict[str, Callable[..., Any]] = {
        name: _routed(getattr(training, name), getattr(keras.Model, name), strategy)
        for name in ("fit", "evaluate", "predict")
    }
    if current(strategy).strategy.place.num_workers > 1:
        methods["save"] = _whole(keras.Model.save)
        methods["save_weights"] = _whole(keras.Model.save_weights)
    replaced = {name: vars(keras.Model).get(name) for name in methods}
    for name, method in methods.items():
        setattr(keras.Model, name, method)
    return DropIn(replaced)


def _routed(function: Callable[..., Any], original: Any, strategy: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        if "_use_cached_eval_dataset" in kwargs:  # Keras's fit calling its own evaluate
            return original(model, *args, **kwargs)
        return function(model, *args, strategy=strategy, **kwargs)

    return method


def _whole(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def method(model: Any, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        with _appearing(Path(filepath)) as path:
            return save(model, path, *args, **kwargs)

    return method


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `target` when the writing is done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as folder:
        path = Path(folder) / target.name
        yield path
        for written in Path(folder).iterdir():  # a sharded save writes several
            if written.is_dir():
                shutil.rmtree(target.parent / written.name, ignore_errors=True)
            os.replace(written, target.parent / written.name)
