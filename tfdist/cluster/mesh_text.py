"""A mesh of devices as text, as in `tfdist run --mesh batch=2,model=2`."""

from __future__ import annotations

from tfdist.errors import ArgumentError


def parse_mesh(text: str) -> dict[str, int]:
    """Reads a mesh such as `batch=2,model=2`.

    Args:
        text: The mesh.

    Raises:
        ArgumentError: It is malformed.

    Example:
        >>> parse_mesh("batch=2,model=2")
        {'batch': 2, 'model': 2}
    """
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    names = [name.strip() for name, _ in pairs]
    are_sizes = all(size.strip().isdecimal() and int(size) > 0 for _, size in pairs)
    if not all(names) or len(set(names)) < len(names) or not are_sizes:
        raise ArgumentError(
            f"A mesh must be distinct names with sizes. Received: {text!r}. "
            "For example: batch=2,model=2."
        )
    return {name: int(size) for name, (_, size) in zip(names, pairs, strict=True)}
