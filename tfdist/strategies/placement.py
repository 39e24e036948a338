"""`tfdist.placement`: the server of each variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from tfdist import _keras
from tfdist.errors import ArgumentError
from tfdist.figures import html_table, text_table
from tfdist.strategies.base import Strategy
from tfdist.strategies.parameter_server import ParameterServer
from tfdist.strategies.session import current


class PlacementTable:
    """A table of variables, which terminals and notebooks show."""

    _columns: tuple[str, ...]
    _num_left: int  # The columns of texts. Those of numbers follow.

    def __str__(self) -> str:
        table = text_table([self._columns, *self._cells()], self._num_left)
        return f"{table}\n{self._totals}"

    def _repr_html_(self) -> str:
        return html_table(self._columns, self._cells(), below=self._totals)

    def _cells(self) -> list[tuple[str, ...]]:
        raise NotImplementedError

    @property
    def _totals(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Home:
    """Rows of a variable on a server.

    Attributes:
        path: The variable's path in the model.
        shape: The shape of these rows.
        server: The server's index.
        bytes: Number of bytes of these rows.
        state_bytes: Number of bytes of the optimizer's state for these rows.
    """

    path: str
    shape: tuple[int, ...]
    server: int
    bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Placement(PlacementTable):
    """The server of each variable. It prints as a table.

    Attributes:
        homes: The servers of all variables, in the model's order.
        num_servers: Number of servers.
    """

    homes: tuple[Home, ...]
    num_servers: int
    _columns = ("variable", "shape", "server", "bytes", "optimizer's")
    _num_left = 3

    def bytes_of(self, server: int) -> int:
        """Counts the bytes on a server, with the optimizer's state.

        Args:
            server: The server's index.
        """
        return sum(h.bytes + h.state_bytes for h in self.homes if h.server == server)

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (h.path, str(h.shape), f"ps {h.server}", f"{h.bytes:,}", f"{h.state_bytes:,}")
            for h in self.homes
        ]

    @property
    def _totals(self) -> str:
        totals = ", ".join(f"ps {s}: {self.bytes_of(s):,}" for s in range(self.num_servers))
        return f"bytes of each server: {totals}"


def built_optimizers(model: Any) -> list[Any]:
    """Returns the optimizers of a built model, which get their state, if they have none.

    Args:
        model: The `keras.Model`.

    Returns:
        As `_keras.optimizers_of`.

    Raises:
        ArgumentError: It is no model, or not built.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ArgumentError(
            "`model` must be a built keras.Model. Received: "
            f"model={model!r}. Give it an Input, or call it once."
        )
    optimizers = _keras.optimizers_of(model)
    for optimizer in optimizers:
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
    return optimizers


def has_servers(strategy: Any) -> bool:
    """Tells whether variables are on parameter servers.

    Args:
        strategy: As in `tfdist.fit`. Its session begins, if there is none.
    """
    return _selected(strategy).has_servers


def _selected(strategy: Any) -> Strategy:
    # One that is made for looking only may not be one of this process.
    return strategy if isinstance(strategy, ParameterServer) else current(strategy).strategy


def placement(model: Any, strategy: Any = "auto") -> Placement:
    """Shows the server of each variable of a model during training.

    Args:
        model: A compiled and built `keras.Model`.
        strategy: As in `tfdist.fit`. It must be `parameter_server`.

    Returns:
        The placement. Print it to see a table.

    Raises:
        ArgumentError: The model is not built, or the strategy has no servers.

    Example:
        >>> print(tfdist.placement(model))  # doctest: +SKIP
        variable           shape     server  bytes  optimizer's
        dense/kernel       (64, 10)  ps 0    2,560        5,120
        dense/bias         (10,)     ps 1       40           80
        bytes of each server: ps 0: 7,680, ps 1: 120
    """
    selected = _selected(strategy)
    if not isinstance(selected, ParameterServer):
        raise ArgumentError(
            "`placement` needs the strategy 'parameter_server'. Received: "
            f"strategy={selected.name!r}. Start the script with `tfdist run -n 2 --ps 2`."
        )
    optimizers = built_optimizers(model)
    homes = []
    for variable, parts, slots in selected.placed(model.variables, optimizers):
        rows = int(variable.shape[0]) if variable.shape.rank else 1
        for part in parts:
            fraction = (part.end - part.begin) / rows if len(parts) > 1 else 1.0
            shape = tuple(variable.shape)
            homes.append(
                Home(
                    variable.path,
                    (part.end - part.begin, *shape[1:]) if len(parts) > 1 else shape,
                    part.server,
                    round(_keras.num_bytes(variable) * fraction),
                    round(sum(map(_keras.num_bytes, slots)) * fraction),
                )
            )
    order = {v.path: i for i, v in enumerate(model.variables)}
    homes.sort(key=lambda home: order.get(home.path, len(order)))
    return Placement(tuple(homes), selected.num_servers)
