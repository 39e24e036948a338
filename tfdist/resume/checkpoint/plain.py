"""Encodes Python state as JSON, with its arrays kept separately.

Only data is written, never code, unlike with pickle. So a checkpoint from an untrusted source
cannot run code when it is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist import _keras


class NotPlain(Exception):  # noqa: N818, describes a value
    """A value does not consist of numbers, text, arrays and Python's containers."""


def encode(value: Any, arrays: list[Any]) -> Any:
    """Encodes a value for JSON.

    Args:
        value: Numbers, text, bytes, arrays, and lists, tuples, sets and dicts of them.
        arrays: A list to which copies of the arrays are appended. The result has their
            indices.

    Raises:
        NotPlain: The value contains something else.
    """
    # Exact types: an instance of a subclass, such as an enum, would come back as a plain
    # number.
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
    # A copy, since training goes on while the array is written.
    arrays.append(np.array(value))
    return {kind: len(arrays) - 1}


def decode(encoded: Any, arrays: Callable[[int], Any]) -> Any:
    """Decodes a value.

    Args:
        encoded: The result of `encode`.
        arrays: Returns a NumPy array by its index.
    """
    if not isinstance(encoded, dict):
        return encoded
    ((name, content),) = encoded.items()
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "dict":
        return {decode(k, arrays): decode(v, arrays) for k, v in content}
    if name in _KINDS:
        return _KINDS[name](decode(item, arrays) for item in content)
    array = arrays(content)
    if name == "scalar":
        return np.asarray(array)[()]
    # TensorFlow's checkpoint reader returns an array of a single number as a plain number.
    return tf.constant(array) if name == "tensor" else np.array(array)


_SEQUENCES: dict[Any, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
_KINDS: dict[str, Callable[..., Any]] = {name: kind for kind, name in _SEQUENCES.items()}


def plain_logs(logs: Any, arrays: list[Any]) -> Any:
    """Encodes a step's logs for JSON. Values that are not plain are left out.

    Args:
        logs: The logs by name, or None.
        arrays: A list to which the arrays of the logs are appended.
    """
    plain = {}
    for name, value in (logs or {}).items():
        with contextlib.suppress(NotPlain):
            encode(value, [])
            plain[name] = np.asarray(value) if tf.is_tensor(value) else value
    return encode(plain, arrays)
