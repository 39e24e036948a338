"""Adds an entry to the files that Keras saves: `.keras` and `.weights.h5`.

The entry is an additional array among the weights. Keras without tfdist can still read such
files, since it looks up the weights by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras.src.saving import saving_lib as _saving_lib

_ENTRY = "json"


def carry_in_files(
    name: str,
    write: Callable[[Any], bytes | None],
    read: Callable[[Any, bytes], None],
) -> None:
    """Adds an entry to the files of all models and layers, from now on in this process.

    Relies on `_save_state` and `_load_state`, which visit a model and all its parts. For every
    file format, both are called first for the model itself, with an empty path.

    Args:
        name: The name of the entry in the file.
        write: Returns the entry of a model, or None if it has none.
        read: Called with a loaded model and the entry of its file.
    """
    save, load = _saving_lib._save_state, _saving_lib._load_state

    def save_state(
        saveable: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        result = save(saveable, weights_store, assets_store, inner_path, *args, **options)
        # Keras visits each part of a model with its path. The entry is of the whole model.
        if not inner_path and isinstance(saveable, keras.Layer) and weights_store:
            entry = write(saveable)
            if entry is not None:
                weights_store.make(name)[_ENTRY] = np.frombuffer(entry, np.uint8)
        return result

    def load_state(
        saveable: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        result = load(saveable, weights_store, assets_store, inner_path, *args, **options)
        is_outermost = not inner_path and isinstance(saveable, keras.Layer) and weights_store
        entries = weights_store.get(name) if is_outermost else {}
        if _ENTRY in entries.keys():  # noqa: SIM118, Keras's store is no dict
            read(saveable, bytes(np.asarray(entries[_ENTRY], np.uint8)))
        return result

    # For good, not in a context: a script may save and load at any time, and the entry must not
    # get lost.
    _saving_lib._save_state, _saving_lib._load_state = save_state, load_state
