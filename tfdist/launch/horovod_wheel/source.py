"""What is changed in Horovod's source before it is built."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tfdist.errors import BuildError


@dataclass(frozen=True)
class Change:
    """A change to the one line of a file that holds a text.

    Attributes:
        file: Below the source's root.
        old: What the line holds.
        new: What takes the place of `old`; the whole line goes if None.
    """

    file: str
    old: str
    new: str | None = None


CHANGES = (
    # TensorFlow's wheel lacks headers that this file includes, and nothing else needs the file.
    Change("horovod/tensorflow/CMakeLists.txt", "xla_mpi_ops.cc"),
    # The vector is filled through data() and stays empty, so no rank is ever found stalled.
    Change(
        "horovod/common/gloo/gloo_controller.cc",
        "global_ranks_.reserve(size_);",
        "global_ranks_.resize(size_);",
    ),
)
CHANGES_KEY = hashlib.sha256(repr(CHANGES).encode()).hexdigest()[:8]
"""Stands for the changes in the name of a wheel's folder."""


def change_source(tree: Path) -> None:
    """Makes all changes.

    Args:
        tree: The unpacked source.

    Raises:
        BuildError: The source is not the one expected.
    """
    for change in CHANGES:
        path = tree / change.file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        found = [index for index, line in enumerate(lines) if change.old in line]
        if len(found) != 1:
            raise BuildError(
                f"One line of Horovod's {change.file} must hold {change.old}. "
                f"Received: {len(found)}. Is pip's index one with changed sources?"
            )
        (index,) = found
        old, new = change.old, change.new
        lines[index] = "" if new is None else lines[index].replace(old, new)
        path.write_text("".join(lines))
