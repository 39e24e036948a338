"""Something of a model's own in the files that Keras saves: `.keras` and `.weights.h5`.

It is one more array among the weights, under a name of its own. Keras without tfdist reads such
files as ever, since it looks up what it needs by name.
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
    """Lets the files of each model, or layer, hold something more, from now on in this process.

    `_save_state` and `_load_state` go through a model and all its parts; both are called for
    the model itself first, with an empty path, whatever the format of the file is.

    Args:
        name: In the file.
        write: Gives a model's, or None if it has nothing to be saved.
        read: Called with a model that was loaded, and what its file held.
    """
    save, load = _saving_lib._save_state, _saving_lib._load_state

    def save_state(
        saveable: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        done = save(saveable, weights_store, assets_store, inner_path, *args, **options)
        if not inner_path and isinstance(saveable, keras.Layer) and weights_store:
            written = write(saveable)
            if written is not None:
                weights_store.make(name)[_ENTRY] = np.frombuffer(written, np.uint8)
        return done

    def load_state(
        saveable: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        done = load(saveable, weights_store, assets_store, inner_path, *args, **options)
        is_whole = not inner_path and isinstance(saveable, keras.Layer) and weights_store
        found = weights_store.get(name) if is_whole else {}
        if _ENTRY in found.keys():  # noqa: SIM118, a store of Keras's is no dict
            read(saveable, bytes(np.asarray(found[_ENTRY], np.uint8)))
        return done

    _saving_lib._save_state, _saving_lib._load_state = save_state, load_state
