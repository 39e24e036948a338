"""The base of strategies with several processes, which exchange objects as bytes."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tfdist import _keras, watchdog
from tfdist.strategies.base import Strategy
from tfdist.watchdog.timeouts import WaitLimit

BYTES_SENT = 2**26  # of variables at a time: a copy of all would be the peak of a training


class Connected(Strategy):
    """A strategy whose processes exchange bytes. A subclass implements the exchange.

    Args:
        wait_limit: Limits how long this process waits for its peers.
    """

    def __init__(self, wait_limit: WaitLimit | None = None) -> None:
        self._wait_limit = wait_limit

    @abc.abstractmethod
    def broadcast_bytes(self, content: bytes) -> bytes:
        """Returns the chief's bytes on every worker.

        Args:
            content: Bytes of the same length on every worker.
        """

    @abc.abstractmethod
    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Collects the bytes of every worker, in the workers' order.

        Args:
            content: At least one byte.
        """

    def agree(self, variables: Sequence[Any]) -> None:
        """Assigns the chief's values to `variables` on every worker, bit by bit."""
        if self.place.num_workers == 1 or not variables:
            return
        if len(set(self.gather_objects(_digest(variables)))) == 1:
            return  # Usual from the second `fit` on. Sending and assigning take much longer.
        with self._exchanging("the chief's weights"):
            for group in _groups(variables):
                self._take_chiefs(group)

    def _take_chiefs(self, variables: Sequence[Any]) -> None:
        # As bytes, which arrive bit by bit: NaN and -0.0 too.
        local_values = [_value(variable) for variable in variables]
        content = b"".join(value.tobytes() for value in local_values)
        received = self.broadcast_bytes(content) if content else b""
        start = 0
        for variable, value in zip(variables, local_values, strict=True):
            part = np.frombuffer(received, value.dtype, value.size, offset=start)
            start += value.nbytes
            variable.assign(part.reshape(value.shape))

    def gather_objects(self, value: Any) -> list[Any]:
        """Collects an object of every worker, in the workers' order."""
        if self.place.num_workers == 1:
            return [value]
        with self._exchanging("an exchange of settings between workers"):
            return [pickle.loads(part) for part in self.gather_bytes(pickle.dumps(value))]

    @contextlib.contextmanager
    def _exchanging(self, what: str) -> Iterator[None]:
        with watchdog.here.while_doing(watchdog.EXCHANGING), self.waiting_for(what):
            yield

    def waiting_for(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Limits a wait for the other workers."""
        if self._wait_limit is None:
            return contextlib.nullcontext()
        return self._wait_limit.waiting_for(what)


def _value(variable: Any) -> Any:
    return np.asarray(keras.ops.convert_to_numpy(variable))


def _digest(variables: Sequence[Any]) -> bytes:
    """Hashes the values of variables one after the other, without a copy of all."""
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(_value(variable).tobytes())
    return digest.digest()


def _groups(variables: Sequence[Any]) -> Iterator[list[Any]]:
    """Groups variables to send together, so that no copy of all is needed."""
    group: list[Any] = []
    size = 0
    for variable in variables:
        group.append(variable)
        size += _keras.num_bytes(variable)
        if size > BYTES_SENT:
            yield group
            group, size = [], 0
    if group:
        yield group
