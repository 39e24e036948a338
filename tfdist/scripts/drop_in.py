"""Distributes an unmodified Keras script: its `fit` becomes tfdist's."""

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

_PROCESS_START = time.time()
_inodes: dict[str, int] = {}  # of the folder at a path after its last save
_PATH_ARGUMENTS = ("filepath", "export_dir")
# Functions of an object and a path.
_SAVERS = (
    (keras.saving, "save_model"),
    (keras.saving, "save_weights"),
    (keras.models, "save_model"),
    (tf.saved_model, "save"),
)


class DropIn(replacing):
    """The replacements of `drop_in`. `undo`, or its exit as a context, restores Keras.

    Args:
        methods: The new methods of `keras.Model`, by name.
        strategy: The strategy of this process.
    """

    def __init__(self, methods: dict[str, Any], strategy: Strategy) -> None:
        super().__init__(methods)
        self._stack = contextlib.ExitStack()
        routing.note_drop_in(1)
        self._stack.callback(routing.note_drop_in, -1)
        if strategy.place.num_replicas > 1 or strategy.has_servers:
            self._stack.callback(claim(strategy))
        if strategy.place.num_workers > 1:
            # These are callbacks, not context managers: a script may drop the handle at once,
            # and a generator-based context would end with it.
            for module, name in _SAVERS:
                original = getattr(module, name, None)
                if original is None:  # this version of Keras lacks it
                    continue
                self._replace(module, name, _atomic(original))
            self._replace(_keras.CheckpointSaver, "save", _save_checkpoint_atomically)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Restores Keras's and TensorFlow's functions. A second call has no effect."""
        super().undo()
        self._stack.close()


def drop_in(strategy: Any = "auto") -> DropIn:
    """Makes every `keras.Model` train, evaluate and predict with tfdist.

    Then `model.fit(...)` in a script runs on all replicas, and its `batch_size` is that of the
    global batch. On several workers, a model is saved to a temporary file, which gets its
    name when it is complete. All workers have the same weights and write the same file, and
    no reader sees a part of it.

    Args:
        strategy: As in `tfdist.fit`.

    Returns:
        A handle with `undo()`. It is also a context manager.

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
    current_strategy = current(strategy).strategy
    if current_strategy.place.num_workers > 1:
        for name in ("save", "save_weights", "export"):
            methods[name] = _atomic(getattr(keras.Model, name))
    return DropIn(methods, current_strategy)


def _routed(function: Callable[..., Any], original: Any, strategy: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        if is_running():  # called in a callback, or by Keras's own fit for validation
            return original(model, *args, **kwargs)
        return function(model, *args, strategy=strategy, **kwargs)

    return method


def _atomic(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def method(saved_object: Any, *args: Any, **kwargs: Any) -> Any:
        name = next((name for name in _PATH_ARGUMENTS if name in kwargs), None)
        target = args[0] if name is None else kwargs[name]
        if not _is_local(target):
            return save(saved_object, *args, **kwargs)
        with _temporary_path(Path(target)) as path:
            if name is None:
                return save(saved_object, str(path), *args[1:], **kwargs)
            return save(saved_object, *args, **{**kwargs, name: str(path)})

    return method


_tensorflow_save = _keras.CheckpointSaver.save


@functools.wraps(_tensorflow_save)
def _save_checkpoint_atomically(saver: Any, file_prefix: Any, *args: Any, **kwargs: Any) -> Any:
    """Saves a `tf.train.Checkpoint`. Its files get their names when they are complete."""
    if not _is_local(file_prefix):
        return _tensorflow_save(saver, file_prefix, *args, **kwargs)
    with _temporary_path(Path(file_prefix)) as path:
        _tensorflow_save(saver, str(path), *args, **kwargs)
    return file_prefix


def _is_local(path: Any) -> bool:
    return isinstance(path, str | os.PathLike) and "://" not in str(path)


@contextlib.contextmanager
def _temporary_path(target: Path) -> Iterator[Path]:
    """Yields a temporary path to write to. At the end, it is moved to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as folder:
        path = Path(folder) / target.name
        yield path
        for saved in sorted(Path(folder).iterdir()):  # a sharded save writes its index last
            destination = target.parent / saved.name
            if saved.is_dir():
                _move_folder_once(saved, destination)
            else:
                os.replace(saved, destination)


def _move_folder_once(saved: Path, destination: Path) -> None:
    """Moves a folder to its destination, unless another worker has moved its own there.

    Somebody may already read the other worker's folder, file by file, and the files of two
    workers do not fit together.
    """
    key = str(destination.resolve())
    if not _is_of_this_save(destination, _inodes.get(key)):
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".old-") as old:
            with contextlib.suppress(FileNotFoundError):
                os.rename(destination, Path(old) / destination.name)
            with contextlib.suppress(OSError):  # another worker was faster
                os.rename(saved, destination)
    _inodes[key] = destination.stat().st_ino


def _is_of_this_save(destination: Path, last_inode: int | None) -> bool:
    """Returns whether another worker has written the folder since this worker's last save."""
    try:
        status = destination.stat()
    except FileNotFoundError:
        return False
    if last_inode is None:
        return status.st_ctime >= _PROCESS_START
    return status.st_ino != last_inode
