"""Assigns variables to servers: balances bytes, and splits large variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """The size of a variable, with its optimizer's state.

    Attributes:
        rows: Its first dimension; 1 for a scalar.
        bytes: Bytes of the variable and of the optimizer's variables of its shape.
        can_split: Whether its rows can be updated independently of each other.
    """

    rows: int
    bytes: int
    can_split: bool


class VariableSlice(NamedTuple):
    """Rows of a variable on one server.

    Attributes:
        server: The server's index.
        begin: The first row.
        end: One past the last row.
    """

    server: int
    begin: int
    end: int


def place(
    sizes: Sequence[Size], servers: int, min_part_bytes: int
) -> list[tuple[VariableSlice, ...]]:
    """Assigns variables to servers: the largest first, each to the server with fewest bytes.

    A variable of at least twice `min_part_bytes` is split by rows over servers, so that each
    part has at least `min_part_bytes`. No server gets more than 4/3 of the bytes that the
    best placement of the same parts would give it (Graham, "Bounds on multiprocessing timing
    anomalies", 1969).

    Args:
        sizes: The size of each variable.
        servers: Number of servers.
        min_part_bytes: Smallest number of bytes of a part.

    Returns:
        The parts of each variable, in the order of their rows.

    Example:
        >>> place([Size(10, 400, True), Size(1, 100, False)], 2, 100)
        [(VariableSlice(server=0, begin=0, end=5), VariableSlice(server=1, begin=5, end=10)), (VariableSlice(server=0, begin=0, end=1),)]
    """  # noqa: E501
    load = [0] * servers
    placed: list[tuple[VariableSlice, ...]] = [()] * len(sizes)
    # The largest first: small ones then fill up what is uneven.
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i].bytes):
        size = sizes[index]
        # At most one part a server, with at least a row and the least number of bytes.
        parts = min(servers, size.rows, size.bytes // max(1, min_part_bytes))
        parts = parts if size.can_split and parts > 1 else 1
        edges = [size.rows * i // parts for i in range(parts + 1)]
        homes = sorted(sorted(range(servers), key=lambda server: load[server])[:parts])
        for server in homes:
            load[server] += size.bytes // parts
        placed[index] = tuple(
            VariableSlice(server, edges[i], edges[i + 1]) for i, server in enumerate(homes)
        )
    return placed
