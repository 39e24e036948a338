"""The check before a private training, made once for the same model, weights and rows.

It takes 40% of a small private training, and depends on nothing else. Models of Keras's own
layers and losses in a row are known again; all others are checked each time, and so is a model
that was refused.
"""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.privacy import run as private
from tfdist.privacy.mechanism import independence

_passed: set[str] = set()


def install() -> None:
    """Lets `fit`, and nobody else, leave out a check that would be the same again."""
    private.independence = SimpleNamespace(ROWS=independence.ROWS, check=_check)


def _check(model: Any, x: Any, y: Any, sample_weight: Any = None) -> None:
    key = _key(model, (x, y, sample_weight))
    if key in _passed:
        return
    independence.check(model, x, y, sample_weight=sample_weight)
    if key is not None:
        _passed.add(key)


def _key(model: Any, rows: Any) -> str | None:
    loss = model.loss
    parts = [*getattr(model, "layers", ()), *([] if isinstance(loss, str) else [loss])]
    if type(model) is not keras.Sequential or not all(map(_is_of_keras, parts)):
        return None
    described = [(type(part).__name__, part.get_config()) for part in parts]
    how = (
        model.input_shape,
        model.run_eagerly,
        model.jit_compile,
        isinstance(loss, str) and loss,
    )
    text = json.dumps([_nameless(described), how], sort_keys=True, default=repr)
    found = hashlib.sha256(text.encode())
    for array in (*model.get_weights(), *tf.nest.flatten(rows)):
        value = np.asarray(array)
        found.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    return found.hexdigest()


def _is_of_keras(part: Any) -> bool:
    return type(part).__module__.startswith("keras.") and not getattr(part, "_layers", ())


def _nameless(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _nameless(value) for key, value in config.items() if key != "name"}
    if isinstance(config, list | tuple):
        return [_nameless(value) for value in config]
    return config
