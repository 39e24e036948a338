"""Compression as a part of `fit`."""

from __future__ import annotations

import warnings
from typing import Any

from tfdist.compression.half import HalfPrecision
from tfdist.compression.power_sgd import LowRank
from tfdist.compression.settings import PowerSGD, check
from tfdist.errors import ArgumentError
from tfdist.training.extension import Extension
from tfdist.training.request import Request


class CompressedTraining(Extension):
    """Compresses the gradients that replicas exchange.

    Args:
        compression: The argument `compression` of `fit`.

    Raises:
        ArgumentError: `compression` is not valid.
    """

    name = "compression"

    def __init__(self, compression: Any) -> None:
        self._compression = check(compression)
        if isinstance(self._compression, PowerSGD):
            self.needs_state = True
            self.exchange_maker = LowRank(self._compression)
        elif self._compression is not None:
            self.exchange_maker = HalfPrecision(self._compression)

    def choose(self, request: Request) -> Request:
        """Refuses strategies that do not sum gradients, and private training."""
        strategy = request.session.strategy
        if self._compression is None:
            return request
        if not strategy.synchronous:
            raise ArgumentError(
                "`compression` needs a strategy that sums gradients. Received: compression="
                f"{self._compression!r} with asynchronous {strategy.name}. Leave it out, or "
                "use strategy=tfdist.ParameterServer(synchronous=True)."
            )
        if strategy.has_servers and isinstance(self._compression, PowerSGD):
            raise ArgumentError(
                "`PowerSGD` needs replicas that keep their state. Received: compression="
                f"{self._compression!r} with {strategy.name}, whose state is on servers. Use "
                "another strategy, or compression='bf16'."
            )
        if not strategy.sums_gradients and isinstance(self._compression, PowerSGD):
            raise ArgumentError(
                "`PowerSGD` needs gradients to be added up. Received: compression="
                f"{self._compression!r} with {strategy.name} that combines them in another "
                "way. Use tfdist.Horovod(op='average')."
            )
        if request.is_private:
            raise ArgumentError(
                "Private training must exchange sums as they are: what a replica sends has "
                "only its part of the noise, and must not be changed before it is added up. "
                f"Received: compression={self._compression!r} with `privacy`. Leave one out."
            )
        self._warn(getattr(request.model.optimizer, "momentum", 0.0))
        return request

    def _warn(self, momentum: Any) -> None:
        compression = self._compression
        if isinstance(compression, PowerSGD) and not compression.warm_start and momentum:
            warnings.warn(
                f"`PowerSGD(warm_start=False)` with momentum={momentum} hardly trains: see "
                "docs/compression.md. Use warm_start=True, or an optimizer without momentum.",
                stacklevel=2,
            )

    def facts(self) -> dict[str, Any]:
        """Returns the compression, which must be equal on all workers."""
        return {"compression": repr(self._compression)}

    def settings(self) -> Any:
        """Returns the compression, which must not change in a continued training."""
        return None if self._compression is None else repr(self._compression)
