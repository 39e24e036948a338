"""Runs an unmodified Keras script distributed: its `fit` becomes tfdist's."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras

from tfdist import training
from tfdist.claims import claim
from tfdist.routing import METHODS, is_running, replacing
from tfdist.session import current
from tfdist.strategies.base import Strategy


class DropIn(replacing):
    """What `drop_in` replaced; leaving it as a context, or `undo`, puts Keras's own back.

    Args:
        methods: Of `keras.Model`, by name.
        strategy: What this process trains with.
    """

    def __init__(self, methods: dict[str, Any], strategy: Strategy) -> None:
        super().__init__(methods)
        several = strategy.place.num_replicas > 1 or strategy.has_servers
        self._unclaim = claim(strategy) if several else lambda: None

    def undo(self) -> None:
        """Puts Keras's and TensorFlow's own back; doing so twice does no harm."""
        super().undo()
        self._unclaim()


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
        name: _routed(getattr(training, name).direct, getattr(keras.Model, name), strategy)
        for name in METHODS
    }
    used = current(strategy).strategy
    if used.place.num_workers > 1:
        methods["save"] = _whole(keras.Model.save)
        methods["save_weights"] = _whole(keras.Model.save_weights)
    return DropIn(methods, used)


def _routed(function: Callable[..., Any], original: Any, strategy: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        if is_running():  # a callback's own, or Keras's fit that validates
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
