"""Runs an unmodified Keras script distributed: its `fit` becomes tfdist's."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import tfdist
from tfdist import _keras
from tfdist.scripts.own_strategies import claim
from tfdist.strategies.base import Strategy
from tfdist.strategies.session import current
from tfdist.training import routing
from tfdist.training.routing import METHODS, is_running, replacing

_STARTED = time.time()
_seen: dict[str, int] = {}  # the folder that was at a path after the last save
_PATHS = ("filepath", "export_dir")  # by which savers take a path
# Functions of something and a path.
_SAVERS = (
    (keras.saving, "save_model"),
    (keras.saving, "save_weights"),
    (keras.models, "save_model"),
    (tf.saved_model, "save"),
)


class DropIn(replacing):
    """What `drop_in` replaced; leaving it as a context, or `undo`, puts Keras's own back.

    Args:
        methods: Of `keras.Model`, by name.
        strategy: What this process trains with.
    """

    def __init__(self, methods: dict[str, Any], strategy: Strategy) -> None:
        super().__init__(methods)
        self._stack = contextlib.ExitStack()
        routing.note_drop_in(1)
        self._stack.callback(routing.note_drop_in, -1)
        if strategy.place.num_replicas > 1 or strategy.has_servers:
            self._stack.callback(claim(strategy))
        if strategy.place.num_workers > 1:
            # Not by contexts: those of a handle that nobody keeps are left when it is freed.
            for module, name in _SAVERS:
                before = getattr(module, name, None)
                if before is None:  # in this version of Keras
                    continue
                self._replace(module, name, _whole(before))
            self._replace(_keras.CheckpointSaver, "save", _whole_checkpoint)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Puts Keras's and TensorFlow's own back; doing so twice does no harm."""
        super().undo()
        self._stack.close()


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
        name: _routed(getattr(tfdist, name).direct, getattr(keras.Model, name), strategy)
        for name in METHODS
    }
    used = current(strategy).strategy
    if used.place.num_workers > 1:
        for name in ("save", "save_weights", "export"):
            methods[name] = _whole(getattr(keras.Model, name))
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
    def method(saved: Any, *args: Any, **kwargs: Any) -> Any:
        name = next((name for name in _PATHS if name in kwargs), None)
        given = args[0] if name is None else kwargs[name]
        if not _is_local(given):
            return save(saved, *args, **kwargs)
        with _appearing(Path(given)) as path:
            if name is None:
                return save(saved, str(path), *args[1:], **kwargs)
            return save(saved, *args, **{**kwargs, name: str(path)})

    return method


_tensorflow_save = _keras.CheckpointSaver.save


@functools.wraps(_tensorflow_save)
def _whole_checkpoint(saver: Any, file_prefix: Any, *args: Any, **kwargs: Any) -> Any:
    """Saves a `tf.train.Checkpoint`: its files take their places when they are complete."""
    if not _is_local(file_prefix):
        return _tensorflow_save(saver, file_prefix, *args, **kwargs)
    with _appearing(Path(file_prefix)) as path:
        _tensorflow_save(saver, str(path), *args, **kwargs)
    return file_prefix


def _is_local(path: Any) -> bool:
    return isinstance(path, str | os.PathLike) and "://" not in str(path)


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `target` when the writing is done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as folder:
        path = Path(folder) / target.name
        yield path
        for written in sorted(Path(folder).iterdir()):  # a sharded save writes its index last
            there = target.parent / written.name
            if written.is_dir():
                _appear_once(written, there)
            else:
                os.replace(written, there)


def _appear_once(written: Path, there: Path) -> None:
    """Moves a folder to its place, unless another worker's of this save is there.

    It may be read by then, file by file, and what two workers wrote is numbered differently.
    """
    key = str(there.resolve())
    if not _is_of_this_save(there, _seen.get(key)):
        with tempfile.TemporaryDirectory(dir=there.parent, prefix=".old-") as old:
            with contextlib.suppress(FileNotFoundError):
                os.rename(there, Path(old) / there.name)
            with contextlib.suppress(OSError):  # another worker's came in between
                os.rename(written, there)
    _seen[key] = there.stat().st_ino


def _is_of_this_save(there: Path, seen: int | None) -> bool:
    try:
        found = there.stat()
    except FileNotFoundError:
        return False
    return found.st_ctime >= _STARTED if seen is None else found.st_ino != seen
