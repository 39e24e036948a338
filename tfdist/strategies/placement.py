"""`tfdist.placement`: which variable is on which server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.strategies.parameter_server import ParameterServer
from tfdist.strategies.parameter_server.held import num_bytes
from tfdist.strategies.session import current


@dataclass(frozen=True)
class Home:
    """Rows of a variable on a server.

    Attributes:
        path: The variable's path in the model.
        shape: The shape of these rows.
        server: The server's number.
        bytes: Of these rows.
        state_bytes: Of what the optimizer keeps for them.
    """

    path: str
    shape: tuple[int, ...]
    server: int
    bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Placement:
    """Which variable is on which server; prints as a table.

    Attributes:
        homes: Of all variables, in the model's order.
        num_servers: How many servers there are.
    """

    homes: tuple[Home, ...]
    num_servers: int

    def bytes_of(self, server: int) -> int:
        """Counts the bytes that a server holds, with the optimizer's state.

        Args:
            server: Its number.
        """
        return sum(h.bytes + h.state_bytes for h in self.homes if h.server == server)

    def __str__(self) -> str:
        rows = [("variable", "shape", "server", "bytes", "optimizer's")]
        rows += [
            (h.path, str(h.shape), f"ps {h.server}", f"{h.bytes:,}", f"{h.state_bytes:,}")
            for h in self.homes
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.rjust(width) if i > 2 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        totals = ", ".join(f"ps {s}: {self.bytes_of(s):,}" for s in range(self.num_servers))
        return "\n".join([*lines, f"bytes of each server: {totals}"])


def placement(model: Any, strategy: Any = "auto") -> Placement:
    """Shows on which server each variable of a model is, or will be, while it trains.

    Args:
        model: A compiled and built `keras.Model`.
        strategy: As in `tfdist.fit`; it must be `parameter_server`.

    Returns:
        The placement; print it for a table.

    Raises:
        ArgumentError: The model is not built, or the strategy has no servers.

    Example:
        >>> print(tfdist.placement(model))  # doctest: +SKIP
        variable           shape     server  bytes  optimizer's
        dense/kernel       (64, 10)  ps 0    2,560        5,120
        dense/bias         (10,)     ps 1       40           80
        bytes of each server: ps 0: 7,680, ps 1: 120
    """
    chosen = strategy if isinstance(strategy, ParameterServer) else current(strategy).strategy
    if not isinstance(chosen, ParameterServer):
        raise ArgumentError(
            "`placement` needs the strategy 'parameter_server'. Received: "
            f"strategy={chosen.name!r}. Start the script with `tfdist run -n 2 --ps 2`."
        )
    if not isinstance(model, keras.Model) or not model.built:
        raise ArgumentError(
            "`model` must be a built keras.Model. Received: "
            f"model={model!r}. Give it an Input, or call it once."
        )
    optimizers = _keras.optimizers_of(model)
    for optimizer in optimizers:
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
    homes = []
    for variable, parts, slots in chosen.placed(model.variables, optimizers):
        rows = int(variable.shape[0]) if variable.shape.rank else 1
        for part in parts:
            share = (part.end - part.begin) / rows if len(parts) > 1 else 1.0
            shape = tuple(variable.shape)
            homes.append(
                Home(
                    variable.path,
                    (part.end - part.begin, *shape[1:]) if len(parts) > 1 else shape,
                    part.server,
                    round(num_bytes(variable) * share),
                    round(sum(map(num_bytes, slots)) * share),
                )
            )
    order = {v.path: i for i, v in enumerate(model.variables)}
    homes.sort(key=lambda home: order.get(home.path, len(order)))
    return Placement(tuple(homes), chosen.num_servers)
