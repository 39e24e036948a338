"""Changes Horovod's source before it is built."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tfdist.errors import BuildError


@dataclass(frozen=True)
class SourceChange:
    """A change to the only line of a file that contains a text.

    Attributes:
        file: The file's path below the source's root.
        old: The text in the line.
        new: The text that replaces `old`; None removes the whole line.
    """

    file: str
    old: str
    new: str | None = None


CHANGES = (
    # TensorFlow's wheel lacks headers that this file includes. Nothing else needs the file.
    SourceChange("horovod/tensorflow/CMakeLists.txt", "xla_mpi_ops.cc"),
    # The vector is written through data() but stays empty, so no stalled rank is ever found.
    SourceChange(
        "horovod/common/gloo/gloo_controller.cc",
        "global_ranks_.reserve(size_);",
        "global_ranks_.resize(size_);",
    ),
    # The context of a process set forgets the interface, and takes the address to which this
    # machine's own name resolves: often one that other machines cannot reach.
    SourceChange(
        "horovod/common/gloo/gloo_context.cc",
        "assert(global_context.IsEnabled());",
        "assert(global_context.IsEnabled());\n  gloo_iface_ = global_context.gloo_iface_;",
    ),
    # So that a wheel with the change above can be told from one without it.
    SourceChange(
        "horovod/__init__.py",
        "__version__ =",
        "keeps_to_interface = True  # in process sets; changed by tfdist\n__version__ =",
    ),
)
CHANGES_KEY = hashlib.sha256(repr(CHANGES).encode()).hexdigest()[:8]
"""A hash of the changes, part of the name of a wheel's folder."""


def change_source(tree: Path) -> None:
    """Makes all changes.

    Args:
        tree: The unpacked source.

    Raises:
        BuildError: The source is not the expected one.
    """
    for change in CHANGES:
        path = tree / change.file
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        matches = [index for index, line in enumerate(lines) if change.old in line]
        if len(matches) != 1:
            raise BuildError(
                f"One line of Horovod's {change.file} must hold {change.old}. "
                f"Received: {len(matches)}. Is pip's index one with changed sources?"
            )
        (index,) = matches
        old, new = change.old, change.new
        lines[index] = "" if new is None else lines[index].replace(old, new)
        path.write_text("".join(lines))
