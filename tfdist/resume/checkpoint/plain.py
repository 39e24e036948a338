"""Python state as JSON, and arrays apart from it.

Only data is written, never what would have to be run to be read again: a checkpoint from
elsewhere can do nothing but be wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras


class NotPlain(Exception):  # noqa: N818, says what a value is
    """A value is not made of numbers, text, arrays and Python's containers."""


def encode(value: Any, arrays: list[Any]) -> Any:
    """Makes what JSON knows of a value.

    Args:
        value: Numbers, text, bytes, arrays, and lists, tuples, sets and dicts of them.
        arrays: Gets copies of the arrays, which the result names by their place.

    Raises:
        NotPlain: It is made of something else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if type(value) in _SEQUENCES:
        return {_SEQUENCES[type(value)]: [encode(item, arrays) for item in value]}
    if isinstance(value, dict):
        pairs = value.items()
        return {"dict": [[encode(k, arrays), encode(v, arrays)] for k, v in pairs]}
    kind = "scalar" if isinstance(value, np.generic) else "array"
    if isinstance(value, _keras.EagerTensor):
        kind, value = "tensor", value.numpy()
    if not isinstance(value, np.ndarray | np.generic):
        raise NotPlain
    if value.dtype.kind not in "biufc" and value.dtype.name != "bfloat16":
        raise NotPlain
    arrays.append(np.array(value))
    return {kind: len(arrays) - 1}


def decode(written: Any, arrays: Callable[[int], Any]) -> Any:
    """Makes the value again.

    Args:
        written: What `encode` gave.
        arrays: Gives a NumPy array by its place.
    """
    if not isinstance(written, dict):
        return written
    ((name, content),) = written.items()
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "dict":
        return {decode(k, arrays): decode(v, arrays) for k, v in content}
    if name in _KINDS:
        return _KINDS[name](decode(item, arrays) for item in content)
    array = arrays(content)
    if name == "scalar":
        return np.asarray(array)[()]
    # An array of a single number comes back from TensorFlow as that number.
    return tf.constant(array) if name == "tensor" else np.array(array)


_SEQUENCES: dict[Any, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
_KINDS: dict[str, Callable[..., Any]] = {name: kind for kind, name in _SEQUENCES.items()}


def plain_logs(logs: Any, arrays: list[Any]) -> Any:
    """Gives what of a step's logs is numbers, as JSON knows it.

    Args:
        logs: By name.
        arrays: Gets the arrays in them.
    """
    found = {}
    for name, value in (logs or {}).items():
        with contextlib.suppress(NotPlain):
            encode(value, [])
            found[name] = np.asarray(value) if tf.is_tensor(value) else value
    return encode(found, arrays)
