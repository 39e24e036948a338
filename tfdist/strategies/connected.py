"""What strategies of several processes share: weights and objects travel as bytes."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tfdist import watchdog
from tfdist.strategies.base import Strategy
from tfdist.watchdog.timeouts import WaitLimit


class Connected(Strategy):
    """A strategy whose processes exchange bytes; a subclass says how.

    Args:
        wait_limit: Limits this process's waits for the others.
    """

    def __init__(self, wait_limit: WaitLimit | None = None) -> None:
        self._wait_limit = wait_limit

    @abc.abstractmethod
    def broadcast_bytes(self, content: bytes) -> bytes:
        """Gives every worker the chief's bytes.

        Args:
            content: Of the same length on every worker.
        """

    @abc.abstractmethod
    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Collects the bytes of every worker, in the order of workers.

        Args:
            content: Of any length but 0.
        """

    def agree(self, variables: Sequence[Any]) -> None:
        """Gives `variables` the chief's values on every worker, bit by bit."""
        if self.place.num_workers == 1 or not variables:
            return
        mine = [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]
        content = b"".join(value.tobytes() for value in mine)
        if len(set(self.gather_objects(hashlib.sha256(content).digest()))) == 1:
            return  # as after every other `fit`: sending and assigning take much longer
        with self._exchanging("the chief's weights"):
            received = self.broadcast_bytes(content)
        start = 0
        for variable, value in zip(variables, mine, strict=True):
            part = np.frombuffer(received, value.dtype, value.size, offset=start)
            start += value.nbytes
            variable.assign(part.reshape(value.shape))

    def gather_objects(self, value: Any) -> list[Any]:
        """Collects an object of every worker, in the order of workers."""
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
