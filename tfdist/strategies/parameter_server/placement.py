"""Which parameter is on which server: large ones split, all balanced by bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """What a variable needs on a server, with what the optimizer keeps for it.

    Attributes:
        rows: Its first dimension; 1 for a scalar.
        bytes: Of the variable and the optimizer's variables of its shape.
        can_split: Whether rows can be updated apart from each other.
    """

    rows: int
    bytes: int
    can_split: bool


class VariableSlice(NamedTuple):
    """Rows of a variable on one server.

    Attributes:
        server: Its number.
        begin: The first row.
        end: The one after the last.
    """

    server: int
    begin: int
    end: int


def place(
    sizes: Sequence[Size], servers: int, min_part_bytes: int
) -> list[tuple[VariableSlice, ...]]:
    """Spreads variables over servers, the largest first, each to the one with fewest bytes.

    A variable of at least twice `min_part_bytes` is split by rows, over as many servers as
    give each part so many bytes. (Graham, "Bounds on multiprocessing timing anomalies", 1969:
    no server gets more than 4/3 of what the best placement of whole parts would give it.)

    Args:
        sizes: Of each variable.
        servers: How many there are.
        min_part_bytes: Of a part.

    Returns:
        For each variable its parts, in the order of their rows.

    Example:
        >>> place([Size(10, 400, True), Size(1, 100, False)], 2, 100)
        [(VariableSlice(server=0, begin=0, end=5), VariableSlice(server=1, begin=5, end=10)), (VariableSlice(server=0, begin=0, end=1),)]
    """  # noqa: E501
    load = [0] * servers
    placed: list[tuple[VariableSlice, ...]] = [()] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i].bytes):
        size = sizes[index]
        parts = min(servers, size.rows, size.bytes // max(1, min_part_bytes))
        parts = parts if size.can_split and parts > 1 else 1
        edges = [size.rows * i // parts for i in range(parts + 1)]
        least = sorted(sorted(range(servers), key=lambda server: load[server])[:parts])
        for server in least:
            load[server] += size.bytes // parts
        placed[index] = tuple(
            VariableSlice(server, edges[i], edges[i + 1]) for i, server in enumerate(least)
        )
    return placed
