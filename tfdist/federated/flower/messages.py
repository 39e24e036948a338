"""What travels between the server and the clients of Flower."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfdist.errors import ArgumentError, MissingPackageError
from tfdist.federated.settings import FedAvg

FORMAT = 1
TAKEN = (
    "local_steps",
    "local_epochs",
    "proximal",
    "clients_per_round",
    "weighting",
    "keep_optimizer",
)
"""The settings of `FedAvg` that a client must know."""


def flower(module: str) -> Any:
    """Imports a module of Flower.

    Args:
        module: "app", "clientapp" or "serverapp".

    Raises:
        MissingPackageError: Flower is not installed.
    """
    try:
        return importlib.import_module(f"flwr.{module}")
    except ImportError:
        raise MissingPackageError(
            "`tfdist.flower` needs Flower. Received: an installation without it. "
            'Install it: pip install "tfdist[flower]".'
        ) from None


@dataclass(frozen=True)
class RoundTask:
    """What the server asks of a client in a round.

    Attributes:
        number: The number of the round.
        client: The number of the client.
        sizes: Rows of each client.
        batch_size: Rows of a local step.
        seed: The seed of the training.
        shuffle: As in `fit`.
        settings: The settings `TAKEN` by name.
        first_step: Updates that the model's optimizers had counted before the first round.
        has_trained: Whether the client has trained in this run before.
    """

    number: int
    client: int
    sizes: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle: bool | str
    settings: dict[str, Any]
    first_step: int
    has_trained: bool

    def averaging(self) -> FedAvg:
        """Returns the settings, without the server's optimizer."""
        return FedAvg(**self.settings)

    def to_record(self) -> Any:
        """Returns it as a record of Flower."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_record(cls, record: Any) -> RoundTask:
        """Reads the result of `to_record`."""
        values = of_plain(record)
        return cls(**(values | {"sizes": tuple(values["sizes"])}))


def plain(values: dict[str, Any]) -> Any:
    """Returns plain data as a record of Flower.

    Args:
        values: Numbers, texts, lists and dicts.
    """
    text = json.dumps({"format": FORMAT, "values": values})
    return flower("app").ConfigRecord({"tfdist": text})


def of_plain(record: Any) -> dict[str, Any]:
    """Reads the result of `plain`.

    Args:
        record: The record.

    Raises:
        ArgumentError: It is of another version of tfdist, or not of tfdist.
    """
    written = json.loads(str(record.get("tfdist", "{}")))
    if written.get("format") != FORMAT:
        raise ArgumentError(
            "The server and all clients must run apps of the same version of tfdist. "
            f"Received: a message of format {written.get('format')!r}, and this process has "
            f"format {FORMAT}. Install the same version everywhere."
        )
    values: dict[str, Any] = written["values"]
    return values


def arrays(values: Sequence[Any]) -> Any:
    """Returns arrays as a record of Flower.

    Args:
        values: NumPy arrays.
    """
    app = flower("app")
    record = app.ArrayRecord()
    for number, value in enumerate(values):
        value = np.asarray(value)
        if value.dtype.kind == "V":  # bfloat16, which files of NumPy do not have
            value = value.astype(np.float32)
        record[str(number)] = app.Array(value)
    return record


def of_arrays(record: Any, like: Sequence[Any], what: str) -> list[Any]:
    """Reads the result of `arrays`.

    Args:
        record: The record.
        like: Variables or arrays of the same shapes and dtypes.
        what: What they are, for a message.

    Raises:
        ArgumentError: There are others than expected.
    """
    return fitting([array.numpy() for array in record.values()], like, what)


def fitting(values: Sequence[Any], like: Sequence[Any], what: str) -> list[Any]:
    """Returns arrays with the dtypes of variables, after a check of their shapes.

    Args:
        values: The arrays.
        like: Variables or arrays of the same shapes and dtypes.
        what: What they are, for a message.

    Raises:
        ArgumentError: There are others than expected.
    """
    shapes = [tuple(value.shape) for value in values]
    expected = [tuple(int(size) for size in each.shape) for each in like]
    if shapes != expected:
        raise ArgumentError(
            "The server and all clients must make the same model, compiled with the same "
            f"optimizer and metrics. Received: {what} of shapes {shapes}, and this process has "
            f"{expected}. Use the same `model_fn` everywhere."
        )
    types = [tf.as_dtype(each.dtype).as_numpy_dtype for each in like]
    return [value.astype(kind) for value, kind in zip(values, types, strict=True)]


def structure(spec: Any) -> Any:
    """Returns the structure of a client's data as plain data.

    Args:
        spec: The result of `Source.spec`.

    Raises:
        ArgumentError: A part of the data is sparse or ragged.
    """
    if isinstance(spec, dict):
        return {"dict": {name: structure(part) for name, part in spec.items()}}
    if isinstance(spec, list | tuple):
        kind = "list" if isinstance(spec, list) else "tuple"
        return {kind: [structure(part) for part in spec]}
    if isinstance(spec, tf.TypeSpec) and not isinstance(spec, tf.TensorSpec):
        raise ArgumentError(
            f"On Flower, data must be dense arrays. Received: {type(spec).__name__}. Convert "
            "it."
        )
    return {"shape": [*spec.shape[1:]], "dtype": tf.as_dtype(spec.dtype).name}


def one_row(written: Any) -> Any:
    """Makes one row of zeros of a structure.

    Args:
        written: The result of `structure`.
    """
    if "dict" in written:
        return {name: one_row(part) for name, part in written["dict"].items()}
    for kind, maker in (("list", list), ("tuple", tuple)):
        if kind in written:
            return maker(one_row(part) for part in written[kind])
    return tf.zeros([1, *written["shape"]], written["dtype"])
